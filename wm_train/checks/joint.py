"""Judge before the start whether all pools of a stage can be evaluated as one model after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wm_train.checks.mesh import mesh_problems
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import Problem


def joint_problems(joint: StagePlan, pools: Mapping[str, StagePlan]) -> list[Problem]:
    """Return what keeps the pools from being judged on the mesh and under the guidance of the run;
    keys relative to the stage."""
    run, problems = joint.config, []
    for name, own in pools.items():
        config = replace(own.config, parallel=run.parallel, workers=run.workers)
        for problem in mesh_problems(replace(own, config=config, launcher=joint.launcher)):
            got = f"{problem.got} for pool {name} in the joint evaluation, on the run's own workers"
            problems.append(replace(problem, got=got))
    guidance = {name: list(own.config.sampler.guidance) for name, own in pools.items()}
    if any(set(names) != set(run.sampler.guidance) for names in guidance.values()):
        got = ", ".join(f"{names} of pool {name}" for name, names in guidance.items())
        rule = f"the run's {list(run.sampler.guidance)}, whose weights alone a pool may change"
        problems.append(Problem("sampler.guidance", got, rule, "the same names"))
    return problems
