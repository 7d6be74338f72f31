"""Write the text of `python -m wm_train.launch --help`: usage, the choices of every group, every
key with its default."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from wm_train.config.compose import config_directory, groups
from wm_train.config.schema import RunConfig

USAGE = """\
usage: python -m wm_train.launch [--dry-run] [--config-dir DIR] [group=choice ...] [key=value ...]

  python -m wm_train.launch experiment=demo stage=1
  python -m wm_train.launch experiment=demo stage=all name=wide model.width=256
  python -m wm_train.launch experiment=demo launcher=inline recipe.stages.short.optimizer.lr=3e-4

stage=        a number, a name, a range such as 1-2, or all
--dry-run     print the resolved config and what would be started
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
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
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


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is dict:
        return "{}"
    if field.default is dataclasses.MISSING or field.default == "???":
        return "(must be given)"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
