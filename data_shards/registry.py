"""Find things by name: tables of import strings, to which other packages add by entry points. A
name is imported only when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from data_shards.schema import DataError


@dataclass(frozen=True)
class Registry:
    """Describe one table. `table`: name -> "module:attribute" of what is built in; `group`: the
    entry point group of other packages; `what`: the word for one of them, and its key on the
    command line."""

    what: str
    group: str
    table: Mapping[str, str]


def names(registry: Registry) -> tuple[str, ...]:
    """Return all names of a registry, the built-in ones first."""
    return tuple(dict.fromkeys([*registry.table, *entry_points(group=registry.group).names]))


def load(registry: Registry, name: str) -> Any:
    """Import what is registered as `name`.

    Raises:
        DataError: an unknown name, one that two packages offer, or a failing import.
    """
    what, group, table = registry.what, registry.group, registry.table
    points = [EntryPoint(name, table[name], group)] if name in table else []
    points += entry_points(group=group, name=name)
    if not points:
        raise DataError(
            f"{what}: got {name!r}, expected one of {', '.join(names(registry))}. Fix: install the"
            f" package that offers it (entry point group {group})"
        )
    if len(points) > 1:
        raise DataError(
            f"{what}: got {name!r}, which is {' and '.join(point.value for point in points)},"
            f" expected one (entry point group {group}). Fix: uninstall one of the packages"
        )
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{what} {name}: cannot import {points[0].value} ({error}), expected an installed"
            " package. Fix: install what it needs"
        ) from error
