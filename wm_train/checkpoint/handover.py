"""Match the parameters of a stage with those of its source, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from wm_train.config.schema import StageConfig


def match_names(patterns: Iterable[str], names: Collection[str], where: str) -> set[str]:
    """Return the names that any of the patterns covers. Raises ValueError for a pattern that covers
    none, as it is a typo."""
    names_covered = set()
    for pattern in patterns:
        covered = {name for name in names if fnmatchcase(name, pattern)}
        if not covered:
            like = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{where}: got {pattern!r}, expected a pattern of parameter names such as {like}."
                " Fix: correct it"
            )
        names_covered |= covered
    return names_covered


@dataclass(frozen=True)
class Handover:
    """Record how the parameters of a stage pair with those of its source, by name."""

    taken: frozenset[str]  # get the source's values
    fresh: frozenset[str]  # start as initialised
    left: frozenset[str]  # in the source only; this stage drops them


def handover(
    stage: StageConfig,
    name: str,
    mine: Collection[str],
    theirs: Collection[str],
    parts: Callable[..., list[str]],
) -> Handover:
    """Match the parameters of a stage with those of its source, by name. `parts` selects the names
    that the stage's own changes of the model may add or remove.

    Raises ValueError for a name on one side without a counterpart, unless the stage declares it.
    """
    where, added, dropped = (
        f"recipe.stages.{name}",
        set(mine) - set(theirs),
        set(theirs) - set(mine),
    )
    declared = match_names(stage.new, mine, f"{where}.new")
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
    fresh = added | match_names(stage.reinitialise, mine, f"{where}.reinitialise")
    return Handover(frozenset(set(mine) - fresh), frozenset(fresh), frozenset(dropped))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
