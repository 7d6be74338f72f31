"""Order the stages of a recipe, and resolve one into a `StagePlan`. Stages inherit weights by
name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wm_train.config.problems import Problem
from wm_train.config.roles import STUDENT, TEACHER, RoleConfig
from wm_train.config.schema import (
    BackendConfig,
    DataConfig,
    LauncherConfig,
    RecipeConfig,
    RunConfig,
    StageConfig,
    TrackerConfig,
)
from wm_train.config.typed import public_config, stage_named
from wm_train.storage import Place, place

PREVIOUS, TOGETHER = "previous", "together"


@dataclass(frozen=True)
class Part:
    """Locate a part of a network's first weights: in `checkpoints`, those whose names there begin
    with `theirs`, for those whose names begin with `mine` instead."""

    checkpoints: Place
    theirs: str = ""
    mine: str = ""


@dataclass(frozen=True)
class Source:
    """Locate a network's first weights: `stage` of the same run, or a checkpoint directory given by
    hand (`stage` None); role: whose they are in it; others: where they are not in one place under
    their own names, all their parts."""

    checkpoints: Place
    stage: str | None
    role: str = STUDENT
    others: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return where the weights are, one part where they are in one place."""
        return self.others or (Part(self.checkpoints),)


@dataclass(frozen=True)
class StagePlan:
    """Describe one stage of a run, resolved: its own sections whole, and where it reads and writes.

    run: the run's name; pool: which group of workers, None without pools; source: None when the
    weights start from the seed; record: the whole run's configuration without logins, as it is
    stored with checkpoints and shown; command: names the command that started the workers, and is
    stored with checkpoints, too.
    """

    run: str
    pool: str | None
    stage: str
    config: StageConfig
    backend: BackendConfig
    launcher: LauncherConfig
    tracker: TrackerConfig
    out: Path
    seed: int
    resume: bool
    directory: Path
    checkpoints: Place
    source: Source | None
    record: Mapping[str, Any] = field(repr=False)
    command: str = ""
    role_sources: Mapping[str, Source | None] = field(default_factory=dict)
    # of the data job that makes the stage's trajectories, else None: what it reads, and from where
    # its teacher's weights come. `config.data` is then what the job makes
    made_from: DataConfig | None = None
    teacher_source: Source | None = None

    @property
    def data_at_start(self) -> DataConfig:
        """Return the data that are there before the stage starts."""
        return self.made_from or self.config.data

    def of_trajectories(self) -> StagePlan:
        """Return the plan of the data job, whose only role is the teacher."""
        job, data = self.config.trajectories, self.made_from
        assert job is not None, "only of a stage that has such a job"
        assert data is not None, "the same"
        config = replace(self.config, data=data, roles={TEACHER: job.teacher}, trajectories=None)
        sources = {TEACHER: self.teacher_source}
        return replace(self, config=config, role_sources=sources, made_from=None)

    def of_role(self, role: str) -> StagePlan:
        """Return the plan of a network beside the student, as if it were the stage's only one."""
        own = self.config.roles[role]
        config = replace(
            self.config,
            model=own.model,
            chunk_frames=own.chunk_frames,
            inherit=own.inherit,
            inherit_weights=own.inherit_weights,
            inherit_optimizer=False,
            optimizer=own.optimizer or self.config.optimizer,
            new=(),
            reinitialise=(),
            frozen=(),
        )
        return replace(self, config=config, source=self.role_sources[role], role_sources={})


def plan_stage(config: RunConfig, stage: str) -> StagePlan:
    """Return the stage as the trainer takes it. Raises ValueError as `source_of` does."""
    own, source = config.recipe.stages[stage], None
    if own.trajectories is not None:
        where = f"recipe.stages.{stage}.trajectories.teacher"
        source = _role_source(config, stage, own.trajectories.teacher, where)
    return StagePlan(
        run=config.name,
        pool=config.pool,
        stage=stage,
        config=replace(own, data=training_data(config, stage)),
        backend=config.backend,
        launcher=launcher_of(config, own),
        tracker=config.tracker,
        out=Path(config.out),
        seed=config.seed,
        resume=config.resume,
        directory=stage_directory(config, stage),
        checkpoints=checkpoints_of(config, stage),
        source=source_of(config, stage),
        record=public_config(config),
        role_sources=role_sources(config, stage),
        made_from=own.data if own.trajectories else None,
        teacher_source=source,
    )


def launcher_of(config: RunConfig, stage: StageConfig) -> LauncherConfig:
    """Return the launcher with a stage's own number of workers, on as few nodes as hold them."""
    launcher = config.launcher
    if stage.workers is None or stage.workers >= launcher.workers:
        return launcher
    on_node = max(1, -(-launcher.workers // max(1, launcher.nodes)))
    return replace(launcher, workers=stage.workers, nodes=max(1, -(-stage.workers // on_node)))


def plan_stages(config: RunConfig) -> tuple[StagePlan, ...]:
    """Return the stages that `config.stage` selects, in order. Raises ValueError as `select` and
    `source_of` do."""
    return tuple(plan_stage(config, name) for name in own_stages(config))


def own_stages(config: RunConfig) -> tuple[str, ...]:
    """Return the stages that `config.stage` selects and this run trains: a pool those that each
    pool trains by itself, the whole run of a run with pools those that they train together. Raises
    ValueError as `select` does."""
    names = select(config.recipe, config.stage)
    if not config.pools:
        return names
    kind = "each" if config.pool else TOGETHER
    return tuple(name for name in names if config.recipe.stages[name].pools == kind)


def ordered(recipe: RecipeConfig) -> tuple[str, ...]:
    """Return stage names by `index`; the order in the YAML file does not count."""
    return tuple(sorted(recipe.stages, key=lambda name: (recipe.stages[name].index, name)))


def select(recipe: RecipeConfig, stage: str) -> tuple[str, ...]:
    """Return the stages that `2`, `long`, `1-2`, `short-long` or `all` means, in order.

    Raises ValueError that lists the stages.
    """
    names = ordered(recipe)
    if stage == "all":
        return names
    name = _find(recipe, stage)
    if name:
        return (name,)
    # Names may hold dashes themselves, so every dash is tried as the one that separates.
    for dash in (position for position, letter in enumerate(stage) if letter == "-"):
        first, last = _find(recipe, stage[:dash]), _find(recipe, stage[dash + 1 :])
        if first and last and names.index(first) <= names.index(last):
            return names[names.index(first) : names.index(last) + 1]
    known = ", ".join(f"{recipe.stages[name].index} {name}" for name in names)
    raise StageError(
        "stage", f"{stage!r}", f"one of {known}, a range such as 1-2, or all", "stage=all"
    )


def stage_directory(config: RunConfig, stage: str) -> Path:
    """Return <out>/<run name>/<stage name>, or <out>/<run name>/<pool>/<stage name>."""
    return Path(config.out) / config.name / (config.pool or "") / stage


def checkpoints_of(config: RunConfig, stage: str) -> Place:
    """Return where a stage saves: <out>/<run name>/<stage name>/checkpoints, or
    <trainer.checkpoint_to>/<run name>/<stage name>."""
    given = config.recipe.stages[stage].trainer.checkpoint_to
    if given is None:
        return stage_directory(config, stage) / "checkpoints"
    return place(given) / "/".join(part for part in (config.name, config.pool, stage) if part)


def training_data(config: RunConfig, stage: str) -> DataConfig:
    """Return the data that a stage trains on: its own, or what its data job makes of them."""
    own = config.recipe.stages[stage]
    if own.trajectories is None:
        return own.data
    made = own.trajectories.path or str(stage_directory(config, stage) / "trajectories")
    return replace(own.data, path=made, mixture={}, selection=())


def source_of(config: RunConfig, stage: str) -> Source | None:
    """Return the source of a stage's first weights. Raises ValueError if the first stage inherits
    from "previous"."""
    where, inherit = f"recipe.stages.{stage}.inherit", config.recipe.stages[stage].inherit
    return _source(config, stage, inherit, where)


def role_sources(config: RunConfig, stage: str) -> dict[str, Source | None]:
    """Return the sources of a stage's other networks by role; None: from the seed, or as the
    student starts. Raises ValueError as `source_of` does."""
    return {
        role: _role_source(config, stage, own, f"recipe.stages.{stage}.roles.{role}")
        for role, own in config.recipe.stages[stage].roles.items()
    }


def _role_source(config: RunConfig, stage: str, own: RoleConfig, where: str) -> Source | None:
    inherit = None if own.inherit == STUDENT else own.inherit
    source = _source(config, stage, inherit, f"{where}.inherit")
    return source and replace(source, role=own.inherit_role)


def _source(config: RunConfig, stage: str, inherit: str | None, where: str) -> Source | None:
    if inherit is None:
        return None
    named = stage_named(config.recipe.stages, stage, inherit)
    if named is not None:
        others = _between_pools(config, stage, named)
        first = others[0].checkpoints if others else checkpoints_of(config, named)
        return Source(first, named, others=others)
    if inherit == PREVIOUS:
        rule = "null or a checkpoint directory, as it is the first stage"
        raise StageError(where, PREVIOUS, rule, "null")
    return Source(place(inherit), None)


def _between_pools(config: RunConfig, stage: str, source: str) -> tuple[Part, ...]:
    """Return the parts of a stage's weights where pools train one of the two stages together and
    the other each by itself; else none."""
    own, other = (config.recipe.stages[name].pools == TOGETHER for name in (stage, source))
    if own == other or not config.pools:
        return ()
    if own:
        runs = {pool: replace(config, pool=pool) for pool in config.pools}
        return tuple(
            Part(checkpoints_of(run, source), mine=f"{pool}.") for pool, run in runs.items()
        )
    whole = checkpoints_of(replace(config, pool=None), source)
    return (Part(whole, theirs=f"{config.pool}."),)


class StageError(ValueError):
    """Report a stage that does not exist, or has no stage to inherit from; `problem` holds the
    parts."""

    def __init__(self, where: str, got: str, rule: str, fix: str) -> None:
        self.problem = Problem(where, got, rule, fix)
        super().__init__(str(self.problem))


def _find(recipe: RecipeConfig, text: str) -> str | None:
    """Return a stage's name from its name or its index."""
    if text in recipe.stages:
        return text
    return next((name for name in ordered(recipe) if str(recipe.stages[name].index) == text), None)
