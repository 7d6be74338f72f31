"""Order the stages of a recipe, and resolve one into a `StagePlan`. Stages inherit weights by
name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wm_train.config.problems import Problem
from wm_train.config.schema import (
    BackendConfig,
    LauncherConfig,
    RecipeConfig,
    RunConfig,
    StageConfig,
    TrackerConfig,
)
from wm_train.config.typed import public_config
from wm_train.storage import Place, place

PREVIOUS = "previous"


@dataclass(frozen=True)
class Source:
    """Locate a stage's first weights: `stage` of the same run, or a checkpoint directory given by
    hand (`stage` None)."""

    checkpoints: Place
    stage: str | None


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


def plan_stage(config: RunConfig, stage: str) -> StagePlan:
    """Return the stage as the trainer takes it. Raises ValueError as `source_of` does."""
    return StagePlan(
        run=config.name,
        pool=config.pool,
        stage=stage,
        config=config.recipe.stages[stage],
        backend=config.backend,
        launcher=config.launcher,
        tracker=config.tracker,
        out=Path(config.out),
        seed=config.seed,
        resume=config.resume,
        directory=stage_directory(config, stage),
        checkpoints=checkpoints_of(config, stage),
        source=source_of(config, stage),
        record=public_config(config),
    )


def plan_stages(config: RunConfig) -> tuple[StagePlan, ...]:
    """Return the stages that `config.stage` selects, in order. Raises ValueError as `select` and
    `source_of` do."""
    return tuple(plan_stage(config, name) for name in select(config.recipe, config.stage))


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


def source_of(config: RunConfig, stage: str) -> Source | None:
    """Return the source of a stage's first weights. Raises ValueError if the first stage inherits
    from "previous"."""
    inherit = config.recipe.stages[stage].inherit
    if inherit is None:
        return None
    if inherit != PREVIOUS:
        return Source(place(inherit), None)
    names = ordered(config.recipe)
    index = names.index(stage)
    if index == 0:
        rule = "null or a checkpoint directory, as it is the first stage"
        raise StageError(f"recipe.stages.{stage}.inherit", PREVIOUS, rule, "null")
    return Source(checkpoints_of(config, names[index - 1]), names[index - 1])


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
