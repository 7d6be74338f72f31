"""Recipe -> ordered stages, and whose weights each one starts from. Stages hand weights on by
name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wm_train.config.schema import ModelConfig, RecipeConfig, RunConfig, StageConfig, StageModel
from wm_train.storage import Place, place

PREVIOUS = "previous"
NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
)  # becomes a folder; no separators, no leading dot or dash


@dataclass(frozen=True)
class Source:
    """Where a stage's first weights come from: `stage` of the same run, or a checkpoint directory
    given by hand (`stage` None)."""

    checkpoints: Place
    stage: str | None


@dataclass(frozen=True)
class PlannedStage:
    """One stage with its place on disk. `source` None: initialised from the seed."""

    name: str
    config: StageConfig
    directory: Path
    checkpoints: Place
    source: Source | None


def ordered(recipe: RecipeConfig) -> tuple[str, ...]:
    """Stage names by `index`; the order in the YAML file does not count."""
    return tuple(sorted(recipe.stages, key=lambda name: (recipe.stages[name].index, name)))


def select(recipe: RecipeConfig, stage: str) -> tuple[str, ...]:
    """`2`, `long`, `1-2`, `short-long` or `all` -> stage names in order. Raises ValueError that
    lists the stages."""
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
    raise ValueError(
        f"stage of recipe {recipe.name}: got {stage!r}, expected one of {known}, a range such as"
        " 1-2, or all. Fix: stage=all"
    )


def stage_directory(config: RunConfig, stage: str) -> Path:
    """<out>/<run name>/<stage name>, or <out>/<run name>/<pool>/<stage name>"""
    return Path(config.out) / config.name / (config.pool or "") / stage


def checkpoints_of(config: RunConfig, stage: str) -> Place:
    """Where a stage saves: <out>/<run name>/<stage name>/checkpoints, or
    <trainer.checkpoint_to>/<run name>/<stage name>."""
    given = config.trainer.checkpoint_to
    if given is None:
        return stage_directory(config, stage) / "checkpoints"
    return place(given) / "/".join(part for part in (config.name, config.pool, stage) if part)


def stage_run(config: RunConfig, stage: str) -> RunConfig:
    """The run as this stage sees it: `model` and `parallel` with the stage's changes in them."""
    own = config.recipe.stages[stage]
    return replace(
        config,
        stage=stage,
        model=changed_model(config.model, own.model),
        parallel=replace(config.parallel, **_given(own.parallel)),
    )


def changed_model(model: ModelConfig, changes: StageModel) -> ModelConfig:
    """The model with what a stage changes of it."""
    return replace(model, **_given(changes))


def _given(changes: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(changes).items() if value is not None}


def matching(patterns: Iterable[str], names: Collection[str], where: str) -> set[str]:
    """The names that any of the patterns covers. Raises ValueError for a pattern that covers none:
    it is a slip."""
    found = set()
    for pattern in patterns:
        covered = {name for name in names if fnmatchcase(name, pattern)}
        if not covered:
            like = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{where}: got {pattern!r}, expected a pattern of parameter names such as {like}."
                " Fix: correct it"
            )
        found |= covered
    return found


@dataclass(frozen=True)
class Handover:
    """How the parameters of a stage meet those of its source, by name."""

    taken: frozenset[str]  # get the source's values
    fresh: frozenset[str]  # start as initialised
    left: frozenset[str]  # the source's own, which this stage has no use for


def handover(
    stage: StageConfig,
    name: str,
    mine: Collection[str],
    theirs: Collection[str],
    parts: Callable[..., list[str]],
) -> Handover:
    """Who gets what. `parts` picks the names that a stage's own changes of the model may add or
    drop.

    Raises ValueError when a name on one side has no counterpart and nothing says that this is
    meant.
    """
    where, added, dropped = (
        f"recipe.stages.{name}",
        set(mine) - set(theirs),
        set(theirs) - set(mine),
    )
    declared = matching(stage.new, mine, f"{where}.new")
    if declared & set(theirs):
        known = sorted(declared & set(theirs))[0]
        raise ValueError(
            f"{where}.new: got {known}, expected names that the source lacks. Fix:"
            f" {where}.reinitialise"
        )
    unexplained = sorted(added - declared - set(parts(added)))
    if unexplained:
        raise ValueError(
            f"{where}: got parameters that its source lacks, {_few(unexplained)}, expected them in"
            f" {where}.new. Fix: add them"
        )
    unknown = sorted(dropped - set(parts(dropped)))
    if unknown:
        raise ValueError(
            f"{where}: got a source with parameters that its model lacks, {_few(unknown)}. Fix: use"
            " the model that wrote it"
        )
    fresh = added | matching(stage.reinitialise, mine, f"{where}.reinitialise")
    return Handover(frozenset(set(mine) - fresh), frozenset(fresh), frozenset(dropped))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def source_of(config: RunConfig, stage: str) -> Source | None:
    """Whose weights `stage` starts from. Raises ValueError if it asks for the previous stage and is
    the first."""
    inherit = config.recipe.stages[stage].inherit
    if inherit is None:
        return None
    if inherit != PREVIOUS:
        return Source(place(inherit), None)
    names = ordered(config.recipe)
    index = names.index(stage)
    if index == 0:
        raise ValueError(
            f"recipe.stages.{stage}.inherit: got previous, expected null or a checkpoint directory,"
            " as it is the first stage. Fix: null"
        )
    return Source(checkpoints_of(config, names[index - 1]), names[index - 1])


def plan(config: RunConfig) -> tuple[PlannedStage, ...]:
    """The stages that `config.stage` selects, in order. Raises ValueError as `select` and
    `source_of` do."""
    return tuple(
        PlannedStage(
            name,
            config.recipe.stages[name],
            stage_directory(config, name),
            checkpoints_of(config, name),
            source_of(config, name),
        )
        for name in select(config.recipe, config.stage)
    )


def _find(recipe: RecipeConfig, text: str) -> str | None:
    """A stage by its name, or by its index."""
    if text in recipe.stages:
        return text
    return next((name for name in ordered(recipe) if str(recipe.stages[name].index) == text), None)
