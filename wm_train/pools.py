"""Several groups of workers in one run, each with its own mesh, model and range of noise levels (MoWorld §3.4.1).

A pool is the run's own command line with the pool's overrides behind it, so everything that a run may set, a pool may set. It trains in
`<out>/<name>/<pool>/<stage>` and knows nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from wm_train.compose import ConfigError, Problem, compose
from wm_train.config import ObjectiveConfig, PoolConfig, RunConfig
from wm_train.curriculum import NAME

SHARED = ("name", "out", "stage", "resume", "tracker", "pools")  # what a pool cannot have for itself
SHARED_LAUNCHER = ("name", "address", "nodes", "slurm")
JOINT = "joint"  # the folder of what all pools make together; stands where a pool's name stands
LEAST_SHARE = 1e-3  # of the noise distribution, below which a range is taken for a mistake


def pool_runs(config: RunConfig, overrides: Sequence[str], extra: Path | None = None) -> dict[str, RunConfig]:
    """Pool name -> its run, of one nameless pool if there are none. Raises ConfigError for what a pool cannot set."""
    chosen = {name: pool for name, pool in config.pools.items() if config.pool in (None, name)}
    problems = _problems(config, len(chosen))
    if problems:
        raise ConfigError(problems)
    if not chosen:
        return {"": config}
    runs: dict[str, RunConfig] = {}
    for name, pool in chosen.items():
        try:
            run = compose([*overrides, *pool.overrides], extra)
        except ConfigError as error:
            problems += [replace(problem, where=f"pools.{name}.overrides: {problem.where}") for problem in error.problems]
            continue
        for where, mine, theirs, keys in (("", run, config, SHARED), ("launcher.", run.launcher, config.launcher, SHARED_LAUNCHER)):
            different = [key for key in keys if getattr(mine, key) != getattr(theirs, key)]
            rule = "what the whole run has, as all pools share it"
            at = f"pools.{name}.overrides"
            problems += [Problem(at, f"another {where}{key}", rule, f"{where}{key}=... for the run") for key in different]
        runs[name] = with_range(replace(run, pool=name), pool)
    if problems:
        raise ConfigError(problems)
    return runs


def _problems(config: RunConfig, chosen: int) -> list[Problem]:
    """Names that become folders, the choice of one, and launchers that start only one group of workers."""
    rule = f"letters, digits, '.', '_' and '-', and neither {JOINT} nor a stage's name, as it names a folder"
    wrong = [name for name in config.pools if not NAME.fullmatch(name) or name == JOINT or name in config.recipe.stages]
    found = [Problem(f"pools.{name}", repr(name), rule, "rename it") for name in wrong]
    if config.pool is not None and not chosen:
        found.append(Problem("pool", repr(config.pool), f"one of {', '.join(config.pools) or 'none'}, or null for all", "pool=null"))
    launcher = config.launcher
    alone = launcher.name == "inline" or (launcher.name == "torchrun" and launcher.nodes > 1)
    if chosen > 1 and (alone or (launcher.name == "slurm" and launcher.slurm.runner == "torchrun")):
        rule = "one that starts several groups of workers: ray, torchrun on one machine, slurm with launcher.slurm.runner=ray"
        found.append(Problem("launcher.name", repr(launcher.name), rule, "launcher=ray, or one after the other with pool=<name>"))
    return found


def named(problems: Iterable[Problem], pool: str) -> list[Problem]:
    """Problems of a pool's own run, which say whose they are."""
    return [replace(problem, where=f"pools.{pool}: {problem.where}" if pool else problem.where) for problem in problems]


def with_range(run: RunConfig, pool: PoolConfig) -> RunConfig:
    """The run with the pool's noise levels in all of its stages."""
    stages = {
        name: replace(stage, objective=replace(stage.objective, sigma_min=pool.sigma_min, sigma_max=pool.sigma_max))
        for name, stage in run.recipe.stages.items()
    }
    return replace(run, recipe=replace(run.recipe, stages=stages))


def boundaries(config: RunConfig) -> dict[str, float]:
    """Pool name -> the noise level from which it is used, highest first, if the pools make all levels between them; else nothing."""
    ordered = sorted(config.pools.items(), key=lambda item: -item[1].sigma_min)
    tops = [pool.sigma_max for _, pool in ordered]
    bottoms = [pool.sigma_min for _, pool in ordered]
    whole = tops == [1.0, *bottoms[:-1]] and bottoms[-1:] == [0.0]
    return {name: pool.sigma_min for name, pool in ordered} if whole else {}


def range_share(objective: ObjectiveConfig) -> float:
    """How much of the noise distribution lies between sigma_min and sigma_max, 0 to 1; 0 for a range that is none."""
    if not (0 <= objective.sigma_min < objective.sigma_max <= 1 and objective.sigma_std > 0 and objective.flow_shift > 0):
        return 0.0

    def below(sigma: float) -> float:
        plain = sigma / (objective.flow_shift - (objective.flow_shift - 1) * sigma)
        if plain <= 0 or plain >= 1:
            return float(plain >= 1)
        return 0.5 * (1 + math.erf((math.log(plain / (1 - plain)) - objective.sigma_mean) / (objective.sigma_std * math.sqrt(2))))

    return below(objective.sigma_max) - below(objective.sigma_min)
