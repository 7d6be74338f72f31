"""Run several groups of workers at once, each with its own mesh, model and range of noise levels
(MoWorld §3.4.1).

A pool is the run's own command line with the pool's overrides behind it, so a pool may set any key
of a run. It trains in `<out>/<name>/<pool>/<stage>`, independently of the other pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from wm_train.config.compose import compose, with_demo
from wm_train.config.curriculum import TOGETHER, own_stages, select
from wm_train.config.kinds import ModelConfig
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.registry import config_class
from wm_train.config.rules import broken_rules
from wm_train.config.schema import NAME, PoolConfig, RunConfig, StageConfig

SHARED = (
    "name",
    "out",
    "stage",
    "resume",
    "tracker",
    "pools",
)  # what a pool cannot have for itself
SHARED_LAUNCHER = ("name", "address", "nodes", "slurm")
QUEUED = ("slurm", "kubernetes")  # launchers whose jobs run when the command has ended
JOINT = "joint"  # the folder of what all pools make together; stands where a pool's name stands


def pool_runs(
    config: RunConfig, overrides: Sequence[str], extra: Path | None = None
) -> dict[str, RunConfig]:
    """Return pool name -> its run, of one nameless pool if there are none; behind them, where such
    stages are selected, the nameless run of those that all pools train together. Raises ConfigError
    for a key that a pool cannot set."""
    chosen = {name: pool for name, pool in config.pools.items() if config.pool in (None, name)}
    problems = _problems(config, len(chosen))
    if problems:
        raise ConfigError(problems)
    if not chosen:
        return {"": config}
    runs: dict[str, RunConfig] = {}
    for name, pool in chosen.items():
        try:
            run = compose([*with_demo(overrides), *pool.overrides], extra)
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
    if config.pool is None and together_stages(config):
        whole = {"": together_run(config, runs)}
        return {**({} if only_together(config) else runs), **whole}
    return runs


def together_stages(config: RunConfig) -> tuple[str, ...]:
    """Return the selected stages that all pools train together, none of a wrong selection."""
    try:
        return own_stages(replace(config, pool=None)) if config.pools else ()
    except ValueError:
        return ()  # reported where all stages are selected


def only_together(config: RunConfig) -> bool:
    """Return whether the pools train nothing of what is selected each by itself."""
    return together_stages(config) == select(config.recipe, config.stage)


def together_run(config: RunConfig, runs: Mapping[str, RunConfig]) -> RunConfig:
    """Return the run of the stages that all pools train together: each network there is one of
    experts, made of the pools' own. Raises ConfigError unless the pools' ranges make all levels."""
    tops = {name: pool.sigma_max for name, pool in config.pools.items()}
    lows = {name: pool.sigma_min or 0.0 for name, pool in config.pools.items()}
    order = sorted(lows, key=lambda name: -lows[name])
    whole = [1.0 if tops[name] is None else tops[name] for name in order]
    if whole != [1.0, *(lows[name] for name in order[:-1])] or lows[order[-1]] != 0.0:
        rule = "ranges without gaps from 0 to 1, as one network is made of the pools' models"
        got = ", ".join(f"{name} {lows[name]:g} to {tops[name] or 1:g}" for name in order)
        raise ConfigError([Problem("pools", got, rule, "adjust sigma_min and sigma_max")])
    wrong = [name for name in order if "." in name]
    if wrong:
        rule = "a name without a dot, as parameters are named after it"
        raise ConfigError([Problem(f"pools.{wrong[0]}", repr(wrong[0]), rule, "rename it")])
    if lost := [*_unheard(config)]:
        raise ConfigError(lost)
    bounds = tuple(lows[name] for name in order)

    def joined(models: Mapping[str, ModelConfig]) -> ModelConfig:
        first = models[order[0]]
        make = config_class("models", "experts")
        own = {name: models[name] for name in order}
        shared = (first.latent_channels, first.activation_checkpointing)
        built: ModelConfig = make("experts", *shared, own, bounds)
        return built

    def of(stage: str) -> StageConfig:
        here = {name: runs[name].recipe.stages[stage] for name in order}
        roles = {
            role: replace(
                own, model=joined({name: one.roles[role].model for name, one in here.items()})
            )
            for role, own in config.recipe.stages[stage].roles.items()
        }
        model = joined({name: one.model for name, one in here.items()})
        return replace(config.recipe.stages[stage], model=model, roles=roles)

    stages = {
        name: of(name) if own.pools == TOGETHER else own
        for name, own in config.recipe.stages.items()
    }
    return replace(config, recipe=replace(config.recipe, stages=stages))


def _unheard(config: RunConfig) -> Iterator[Problem]:
    """Yield what a pool alone changes of a stage that all train together: of it only models are the
    pools' own."""
    for name, pool in config.pools.items():
        for word in pool.overrides:
            keys = word.lstrip("+~").partition("=")[0].split(".")
            stage = config.recipe.stages.get(keys[2]) if len(keys) > 3 else None
            if keys[:2] != ["recipe", "stages"] or stage is None or stage.pools != TOGETHER:
                continue
            if keys[3] != "model" and (keys[3] != "roles" or keys[5:6] != ["model"]):
                rule = f"nothing of stage {keys[2]} but its models, as all pools train it as one"
                yield Problem(f"pools.{name}.overrides", word, rule, f"{word} for the run")


def _problems(config: RunConfig, chosen: int) -> list[Problem]:
    """Return problems of names that become folders, of the selected pool, and of launchers that
    start only one group of workers."""
    rule = (
        f"letters, digits, '.', '_' and '-', and neither {JOINT} nor a stage's name, as it names a"
        " folder"
    )
    wrong = [
        name
        for name in config.pools
        if not NAME.fullmatch(name) or name == JOINT or name in config.recipe.stages
    ]
    problems = [Problem(f"pools.{name}", repr(name), rule, "rename it") for name in wrong]
    for name, pool in config.pools.items():
        problems += [problem.under(f"pools.{name}.") for problem in broken_rules(pool)]
    if config.pool is not None and not chosen:
        problems.append(
            Problem(
                "pool",
                repr(config.pool),
                f"one of {', '.join(config.pools) or 'none'}, or null for all",
                "pool=null",
            )
        )
    if chosen and config.pool and together_stages(config) and only_together(config):
        rule = "null, as all pools together train what is selected"
        problems.append(Problem("pool", repr(config.pool), rule, "pool=null"))
    launcher = config.launcher
    alone = launcher.name == "inline" or (launcher.name == "torchrun" and launcher.nodes > 1)
    if chosen > 1 and (alone or (launcher.name == "slurm" and launcher.slurm.runner == "torchrun")):
        rule = (
            "one that starts several groups of workers: ray, torchrun on one machine, slurm with"
            " launcher.slurm.runner=ray"
        )
        problems.append(
            Problem(
                "launcher.name",
                repr(launcher.name),
                rule,
                "launcher=ray, or one after the other with pool=<name>",
            )
        )
    mixed = len(together_stages(config)) > 0 and not only_together(config)
    if mixed and launcher.name in QUEUED:
        rule = "stages of one kind, as a queue starts the pools' jobs after their own only"
        fix = "stage=<those with pools: each>, and when they have ended the others"
        problems.append(Problem("stage", repr(config.stage), rule, fix))
    return problems


def name_pool(problems: Iterable[Problem], pool: str) -> list[Problem]:
    """Add the pool's name to the keys of its run's problems."""
    return [
        replace(problem, where=f"pools.{pool}: {problem.where}" if pool else problem.where)
        for problem in problems
    ]


def with_range(run: RunConfig, pool: PoolConfig) -> RunConfig:
    """Return the run with each stage's noise levels restricted to the pool's range; a stage whose
    objective has no range stays as it is, as long as it is not selected."""
    stages = {name: _narrowed(stage, pool) for name, stage in run.recipe.stages.items()}
    return replace(run, recipe=replace(run.recipe, stages=stages))


def _narrowed(stage: StageConfig, pool: PoolConfig) -> StageConfig:
    if stage.pools == TOGETHER:
        return stage
    try:
        objective = stage.objective.narrowed(pool.sigma_min, pool.sigma_max)
    except ValueError:
        return stage
    return replace(stage, objective=objective)


def _range_problems(run: RunConfig, name: str, pool: PoolConfig) -> list[Problem]:
    """Return one problem if the pool has no noise level of some stage, or a selected stage has no
    range."""
    empty = []
    try:
        selected = select(run.recipe, run.stage)
    except ValueError:
        selected = ()  # reported where all stages are selected
    for stage, config in run.recipe.stages.items():
        if config.pools == TOGETHER:
            continue
        low, high = config.objective.noise_range()
        try:
            own_low, own_high = config.objective.narrowed(
                pool.sigma_min, pool.sigma_max
            ).noise_range()
        except ValueError:
            if stage not in selected:
                continue
            kind = config.objective.name
            rule = f"null, as {kind} of stage {stage}, which is selected, has no noise range"
            return [
                Problem(f"pools.{name}.sigma_min", _given(pool), rule, "stage=<stages with one>")
            ]
        if low < high and not own_low < own_high:
            empty.append(f"{low:g} to {high:g} in stage {stage}")
    if not empty:
        return []
    rule = f"a rising range that overlaps with the noise levels of every stage: {', '.join(empty)}"
    fix = f"pools.{name}.sigma_min=null pools.{name}.sigma_max=null, which takes all of a stage's"
    return [Problem(f"pools.{name}.sigma_min", _given(pool), rule, fix)]


def _given(pool: PoolConfig) -> str:
    low, high = (
        "null" if value is None else f"{value:g}" for value in (pool.sigma_min, pool.sigma_max)
    )
    return f"{low} to sigma_max {high}"


def boundaries(runs: Mapping[str, RunConfig], stage: str) -> dict[str, float]:
    """Return pool name -> the noise level from which it is used in this stage, highest first.

    Empty unless the pools make all levels between them. runs: of all pools, as `pool_runs` makes.
    """
    ranges = {name: run.recipe.stages[stage].objective.noise_range() for name, run in runs.items()}
    ordered = sorted(ranges.items(), key=lambda item: -item[1][0])
    tops = [high for _, (_, high) in ordered]
    bottoms = [low for _, (low, _) in ordered]
    whole = tops == [1.0, *bottoms[:-1]] and bottoms[-1:] == [0.0]
    return {name: low for name, (low, _) in ordered} if whole else {}
