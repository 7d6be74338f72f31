"""List the settings of a stage that differ from their defaults, and the whole configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from parallel.degrees import MeshDegrees
from wm_train.config.curriculum import StagePlan
from wm_train.redact import clean_value

# the run's own sections; those of a stage are in its `config`
SECTIONS = ("backend", "launcher", "tracker")
ELSEWHERE = ("index",)  # of a stage, which the page says in other places


def changed(plan: StagePlan) -> list[tuple[str, str]]:
    """Return (key, value) of every setting whose value is not the default, without secrets. A
    setting without a default always counts."""
    found = dict(differences(plan.config, ""))
    for section in SECTIONS:
        found |= differences(getattr(plan, section), f"{section}.")
    found |= {"seed": plan.seed, "out": str(plan.out)}
    shown = clean_value({key: value for key, value in found.items() if key not in ELSEWHERE})
    return [(key, plain(value)) for key, value in shown.items()]


def differences(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the fields of a dataclass that are not at their default. The name of a
    choice always counts."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from differences(value, f"{key}.")
        elif field.name == "name" or value != default_of(field):
            yield key, value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field, MISSING without one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def plain(value: Any) -> str:
    """Return a value as it would be typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {plain(item)}' for key, item in value.items())}}}"
    return str(value)


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return the whole configuration as YAML, in the order of its keys."""
    import yaml

    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=88)
    return text


def mesh_of(plan: StagePlan, workers: int) -> str:
    """Return the mesh on `workers` processes in words: "4 workers = dp_shard 2 x ulysses 2"."""
    try:
        needs, wanted = plan.config.model.needs(), plan.config.parallel
        degrees = MeshDegrees.from_config(wanted, workers, needs.heads, needs.key_heads)
    except ValueError as error:  # of a world that the configuration does not allow any more
        return f"{workers} workers ({error})"
    parts = [f"{axis} {size}" for axis, size in vars(degrees).items() if size > 1]
    count = f"{workers} worker{'s' if workers > 1 else ''}"
    return f"{count} = {' × '.join(parts)}" if parts else count
