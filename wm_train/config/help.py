"""Write the text of `python -m wm_train.launch --help`: usage, the choices of every group, every
key with its default."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from wm_train.config import registry
from wm_train.config.compose import config_directory, groups
from wm_train.config.kinds import Named
from wm_train.config.schema import RunConfig

USAGE = """\
usage: python -m wm_train.launch [--dry-run] [--trajectories] [--config-dir DIR] [group=choice ...]
                                 [key=value ...]

  python -m wm_train.launch stage=1-2                  the demo: SANA-WM at toy size, on data/demo
  python -m wm_train.launch stage=3                    the same run goes on
  python -m wm_train.launch stage=all name=wide model.width=256
  python -m wm_train.launch experiment=demo recipe=demo recipe.stages.short.optimizer.lr=3e-4
  python -m wm_train.launch experiment=sana_wm data.path=<folder> stage=all     full size

stage=        a number, a name, a range such as 1-2, or all
--dry-run     print the resolved config and what would be started
--trajectories  run only the data job that such a stage begins with: stage=ode, on any workers
--config-dir  a folder of your own with the same groups (recipe/mine.yaml, experiment/mine.yaml)
"""


def help_text(extra: Path | None) -> str:
    """Return usage, groups and keys as text."""
    folders = [config_directory(), *([extra] if extra else [])]
    lines = [USAGE, "groups:"]
    lines += [f"  {name}= {', '.join(choices)}" for name, choices in groups(folders).items()]
    lines += [
        "",
        "keys and their defaults (the chosen files may set others; --dry-run shows the result):",
    ]
    lines += [f"  {key} = {value}" for key, value in _keys(RunConfig, "")]
    return "\n".join(lines)


def _keys(kind: Any, prefix: str) -> list[tuple[str, str]]:
    hints = typing.get_type_hints(kind)
    keys: list[tuple[str, str]] = []
    for field in dataclasses.fields(kind):
        inner = _without_none(hints[field.name])
        if isinstance(inner, type) and issubclass(inner, Named):
            keys += _keys_of_choices(inner.kind, f"{prefix}{field.name}.")
        elif dataclasses.is_dataclass(inner):
            keys += _keys(inner, f"{prefix}{field.name}.")
        elif typing.get_origin(inner) is dict and dataclasses.is_dataclass(
            typing.get_args(inner)[1]
        ):
            kind_of_item = typing.get_args(inner)[1]
            keys += _keys(
                kind_of_item,
                f"{prefix}{field.name}.<{kind_of_item.__name__.removesuffix('Config').lower()}>.",
            )
        else:
            keys.append((prefix + field.name, _default(field)))
    return keys


def _keys_of_choices(kind: str, prefix: str) -> list[tuple[str, str]]:
    """Return the keys of everything that can be chosen by name, and whose they are if not all's."""
    names = registry.names(kind)
    owners: dict[tuple[str, str], list[str]] = {}
    for name in names:
        try:
            chosen = registry.config_class(kind, name)
        except (ImportError, AttributeError, ValueError) as error:  # another package's, and broken
            owners[f"{prefix}name={name}", f"(cannot be used: {error})"] = list(names)
            continue
        for key, default in _keys(chosen, prefix):
            shown = (key, " | ".join(names) if key == f"{prefix}name" else default)
            owners.setdefault(shown, []).append(name)
    return [
        (key, default if len(having) == len(names) else f"{default}  ({', '.join(having)})")
        for (key, default), having in owners.items()
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is dict:
        return "{}"
    if field.default is dataclasses.MISSING or field.default == "???":
        return "(must be given)"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _without_none(kind: Any) -> Any:
    """Return the section of `Section | None`, and any other type as it is."""
    members = [m for m in typing.get_args(kind) if dataclasses.is_dataclass(m)]
    return members[0] if isinstance(kind, types.UnionType) and len(members) == 1 else kind
