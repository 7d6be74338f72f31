"""Several groups of workers in one run, each with its own mesh, model and range of noise levels
(MoWorld §3.4.1).

A pool is the run's own command line with the pool's overrides behind it, so everything that a run
may set, a pool may set. It trains in `<out>/<name>/<pool>/<stage>` and knows nothing of the others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wm_train.config.compose import ConfigError, Problem, compose
from wm_train.config.curriculum import NAME
from wm_train.config.schema import ObjectiveConfig, PoolConfig, RunConfig

SHARED = (
    "name",
    "out",
    "stage",
    "resume",
    "tracker",
    "pools",
)  # what a pool cannot have for itself
SHARED_LAUNCHER = ("name", "address", "nodes", "slurm")
JOINT = "joint"  # the folder of what all pools make together; stands where a pool's name stands
LEAST_SHARE = 1e-3  # of the noise distribution, below which a range is taken for a mistake


def pool_runs(
    config: RunConfig, overrides: Sequence[str], extra: Path | None = None
) -> dict[str, RunConfig]:
    """Pool name -> its run, of one nameless pool if there are none. Raises ConfigError for what a
    pool cannot set."""
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
            problems += [
                replace(problem, where=f"pools.{name}.overrides: {problem.where}")
                for problem in error.problems
            ]
            continue
        for where, mine, theirs, keys in (
            ("", run, config, SHARED),
            ("launcher.", run.launcher, config.launcher, SHARED_LAUNCHER),
        ):
            different = [key for key in keys if getattr(mine, key) != getattr(theirs, key)]
            rule = "what the whole run has, as all pools share it"
            at = f"pools.{name}.overrides"
            problems += [
                Problem(at, f"another {where}{key}", rule, f"{where}{key}=... for the run")
                for key in different
            ]
        problems += _range_problems(run, name, pool)
        runs[name] = with_range(replace(run, pool=name), pool)
    if problems:
        raise ConfigError(problems)
    return runs


def _problems(config: RunConfig, chosen: int) -> list[Problem]:
    """Names that become folders, the choice of one, and launchers that start only one group of
    workers."""
    rule = (
        f"letters, digits, '.', '_' and '-', and neither {JOINT} nor a stage's name, as it names a"
        " folder"
    )
    wrong = [
        name
        for name in config.pools
        if not NAME.fullmatch(name) or name == JOINT or name in config.recipe.stages
    ]
    found = [Problem(f"pools.{name}", repr(name), rule, "rename it") for name in wrong]
    for name, pool in config.pools.items():
        given = {"sigma_min": pool.sigma_min, "sigma_max": pool.sigma_max}
        found += [
            Problem(f"pools.{name}.{key}", str(value), "a noise level from 0 to 1, or null", "null")
            for key, value in given.items()
            if value is not None and not 0 <= value <= 1
        ]
    if config.pool is not None and not chosen:
        found.append(
            Problem(
                "pool",
                repr(config.pool),
                f"one of {', '.join(config.pools) or 'none'}, or null for all",
                "pool=null",
            )
        )
    launcher = config.launcher
    alone = launcher.name == "inline" or (launcher.name == "torchrun" and launcher.nodes > 1)
    if chosen > 1 and (alone or (launcher.name == "slurm" and launcher.slurm.runner == "torchrun")):
        rule = (
            "one that starts several groups of workers: ray, torchrun on one machine, slurm with"
            " launcher.slurm.runner=ray"
        )
        found.append(
            Problem(
                "launcher.name",
                repr(launcher.name),
                rule,
                "launcher=ray, or one after the other with pool=<name>",
            )
        )
    return found


def named(problems: Iterable[Problem], pool: str) -> list[Problem]:
    """Problems of a pool's own run, which say whose they are."""
    return [
        replace(problem, where=f"pools.{pool}: {problem.where}" if pool else problem.where)
        for problem in problems
    ]


def with_range(run: RunConfig, pool: PoolConfig) -> RunConfig:
    """Return the run whose stages draw those of their own noise levels that are the pool's too."""
    stages = {}
    for name, stage in run.recipe.stages.items():
        low, high = shared_range(stage.objective, pool)
        objective = replace(stage.objective, sigma_min=low, sigma_max=high)
        stages[name] = replace(stage, objective=objective)
    return replace(run, recipe=replace(run.recipe, stages=stages))


def shared_range(objective: ObjectiveConfig, pool: PoolConfig) -> tuple[float, float]:
    """Return (sigma_min, sigma_max) of the noise levels that are the stage's and the pool's.

    Where there are none, the first is not below the second. A stage's range that is none itself
    comes back as it is, for the rules to report.
    """
    low, high = objective.sigma_min, objective.sigma_max
    if not 0 <= low < high <= 1:
        return low, high
    return (
        low if pool.sigma_min is None else max(low, pool.sigma_min),
        high if pool.sigma_max is None else min(high, pool.sigma_max),
    )


def _range_problems(run: RunConfig, name: str, pool: PoolConfig) -> list[Problem]:
    """Return one problem if the pool has no noise level of some stage."""
    own = {stage: config.objective for stage, config in run.recipe.stages.items()}
    empty = [
        f"{noise.sigma_min:g} to {noise.sigma_max:g} in stage {stage}"
        for stage, noise in own.items()
        if noise.sigma_min < noise.sigma_max and not operator.lt(*shared_range(noise, pool))
    ]
    if not empty:
        return []
    given = (pool.sigma_min, pool.sigma_max)
    low, high = ("null" if value is None else f"{value:g}" for value in given)
    rule = f"a rising range that overlaps with the noise levels of every stage: {', '.join(empty)}"
    fix = f"pools.{name}.sigma_min=null pools.{name}.sigma_max=null, which takes all of a stage's"
    return [Problem(f"pools.{name}.sigma_min", f"{low} to sigma_max {high}", rule, fix)]


def boundaries(runs: Mapping[str, RunConfig], stage: str) -> dict[str, float]:
    """Return pool name -> the noise level from which it is used in this stage, highest first.

    Empty unless the pools make all levels between them. runs: of all pools, as `pool_runs` makes.
    """
    noise = {name: run.recipe.stages[stage].objective for name, run in runs.items()}
    ordered = sorted(noise.items(), key=lambda item: -item[1].sigma_min)
    tops = [objective.sigma_max for _, objective in ordered]
    bottoms = [objective.sigma_min for _, objective in ordered]
    whole = tops == [1.0, *bottoms[:-1]] and bottoms[-1:] == [0.0]
    return {name: objective.sigma_min for name, objective in ordered} if whole else {}


def range_share(objective: ObjectiveConfig) -> float:
    """How much of the noise distribution lies between sigma_min and sigma_max, 0 to 1; 0 for a
    range that is none."""
    if not (
        0 <= objective.sigma_min < objective.sigma_max <= 1
        and objective.sigma_std > 0
        and objective.flow_shift > 0
    ):
        return 0.0

    def below(sigma: float) -> float:
        plain = sigma / (objective.flow_shift - (objective.flow_shift - 1) * sigma)
        if plain <= 0 or plain >= 1:
            return float(plain >= 1)
        return 0.5 * (
            1
            + math.erf(
                (math.log(plain / (1 - plain)) - objective.sigma_mean)
                / (objective.sigma_std * math.sqrt(2))
            )
        )

    return below(objective.sigma_max) - below(objective.sigma_min)
