"""Recipe -> ordered stages, and whose weights each one starts from. Stages hand weights on by name:

<out>/<run name>/<stage name>/checkpoints
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from wm_train.config import ModelConfig, RecipeConfig, RunConfig, StageConfig, StageModel

PREVIOUS = "previous"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # becomes a folder; no separators, no leading dot or dash


@dataclass(frozen=True)
class Source:
    """Where a stage's first weights come from: `stage` of the same run, or a checkpoint directory given by hand (`stage` None)."""

    checkpoints: Path
    stage: str | None


@dataclass(frozen=True)
class PlannedStage:
    """One stage with its place on disk. `source` None: initialised from the seed."""

    name: str
    config: StageConfig
    directory: Path
    source: Source | None

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def ordered(recipe: RecipeConfig) -> tuple[str, ...]:
    """Stage names by `index`; the order in the YAML file does not count."""
    return tuple(sorted(recipe.stages, key=lambda name: (recipe.stages[name].index, name)))


def select(recipe: RecipeConfig, stage: str) -> tuple[str, ...]:
    """`2`, `long`, `1-2`, `short-long` or `all` -> stage names in order. Raises ValueError that lists the stages."""
    names = ordered(recipe)
    if stage == "all":
        return names
    found = _find(recipe, stage)
    if found:
        return (found,)
    # Names may hold dashes themselves, so every dash is tried as the one that separates.
    for dash in (position for position, letter in enumerate(stage) if letter == "-"):
        first, last = _find(recipe, stage[:dash]), _find(recipe, stage[dash + 1 :])
        if first and last and names.index(first) <= names.index(last):
            return names[names.index(first) : names.index(last) + 1]
    known = ", ".join(f"{recipe.stages[name].index} {name}" for name in names)
    raise ValueError(f"stage of recipe {recipe.name}: got {stage!r}, expected one of {known}, a range such as 1-2, or all. Fix: stage=all")


def stage_directory(config: RunConfig, stage: str) -> Path:
    """<out>/<run name>/<stage name>, or <out>/<run name>/<pool>/<stage name>"""
    return Path(config.out) / config.name / (config.pool or "") / stage


def stage_run(config: RunConfig, stage: str) -> RunConfig:
    """The run as this stage sees it: `model` with the stage's changes in it."""
    return replace(config, stage=stage, model=changed_model(config.model, config.recipe.stages[stage].model))


def changed_model(model: ModelConfig, changes: StageModel) -> ModelConfig:
    """The model with what a stage changes of it."""
    return replace(model, **{key: value for key, value in vars(changes).items() if value is not None})


def source_of(config: RunConfig, stage: str) -> Source | None:
    """Whose weights `stage` starts from. Raises ValueError if it asks for the previous stage and is the first."""
    inherit = config.recipe.stages[stage].inherit
    if inherit is None:
        return None
    if inherit != PREVIOUS:
        return Source(Path(inherit), None)
    names = ordered(config.recipe)
    place = names.index(stage)
    if place == 0:
        raise ValueError(
            f"recipe.stages.{stage}.inherit: got previous, expected null or a checkpoint directory, as it is the first stage. Fix: null"
        )
    return Source(stage_directory(config, names[place - 1]) / "checkpoints", names[place - 1])


def plan(config: RunConfig) -> tuple[PlannedStage, ...]:
    """The stages that `config.stage` selects, in order. Raises ValueError as `select` and `source_of` do."""
    return tuple(
        PlannedStage(name, config.recipe.stages[name], stage_directory(config, name), source_of(config, name))
        for name in select(config.recipe, config.stage)
    )


def _find(recipe: RecipeConfig, text: str) -> str | None:
    """A stage by its name, or by its index."""
    if text in recipe.stages:
        return text
    return next((name for name in ordered(recipe) if str(recipe.stages[name].index) == text), None)
