"""Read `key=value` arguments: Hydra's grammar where it applies, else plain text.

Paths, names and addresses hold blanks, brackets, `~`, `#` or commas, which mean something in
Hydra's grammar. The value of a key of type text is that text, whatever is in it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wm_train.config import registry
from wm_train.config.kinds import Named
from wm_train.config.problems import Problem
from wm_train.config.schema import RunConfig
from wm_train.config.typed import nearest

KEY = re.compile(r"[+~]*([A-Za-z_][\w.-]*)")
TEXT = "text"  # the rule of a value of type str, as `typed` writes it


def read_overrides(
    overrides: list[str], choices: dict[str, list[str]]
) -> tuple[list[str], list[Problem]]:
    """Check each override by itself; values become `++key=value`, so that unknown keys reach
    `typed.build`, which lists them all."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    lines: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            override = None
        given = _as_text(text)
        if given and (override is None or override.is_sweep_override()):
            text = given
            override = parser.parse_override(text)
        if override is None:
            problems.append(_unreadable(text))
            continue
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            rule = "a key of wm_train; Hydra itself has no settings here"
            problems.append(Problem(key, repr(text), rule, "leave it out"))
        elif override.is_sweep_override():
            rule = "one value; a command runs one configuration"
            problems.append(Problem(key, repr(text), rule, "start one command per value"))
        elif override.type == OverrideType.DEL:
            if key in choices:
                rule = f"one of {', '.join(choices[key])}; a group cannot be left out"
                problems.append(Problem(key, repr(text), rule, f"{key}=<choice>"))
            lines.append(text)
        elif "@" in text.split("=")[0]:
            problems.append(
                Problem(key, repr(text), "a group without a package", f"{key}=<choice>")
            )
        elif key in choices:
            problems.extend(_check_choice(key, override.value(), choices))
            lines.append(text.lstrip("+"))
        else:
            lines.append("++" + text.lstrip("+"))
    return lines, problems


def drop_replaced(plain: Any, lines: list[str]) -> None:
    """Drop the keys that a recipe or a group gives to a part which these overrides replace by name,
    in place: `recipe.stages.short.objective.name=other` starts from the defaults of `other`, and
    keeps the keys that both have. Keys that overrides give themselves stay, to be judged."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [OverridesParser.create().parse_override(line) for line in lines]
    keys = {one.key_or_group for one in given}
    for one in given:
        value = one.value()
        if isinstance(value, dict):
            keys |= {f"{one.key_or_group}.{key}" for key in value}
    for where in (key.removesuffix(".name") for key in keys if key.endswith(".name")):
        section, kind = _section(plain, where), where.rpartition(".")[2] + "s"
        if kind not in registry.TABLES or section.get("name") not in registry.names(kind):
            continue
        known = {name: _keys_of(kind, name) for name in registry.names(kind)}
        replaced = frozenset().union(*known.values()) - known[section["name"]]
        for key in [key for key in section if key in replaced and f"{where}.{key}" not in keys]:
            del section[key]


def _section(plain: Any, where: str) -> Any:
    """Return the mapping at a dotted path; an empty one where there is none."""
    for key in where.split("."):
        plain = plain.get(key) if isinstance(plain, dict) else None
    return plain if isinstance(plain, dict) else {}


def _keys_of(kind: str, name: str) -> frozenset[str]:
    """Return the keys of one part; none of one that is not whole, which is reported elsewhere."""
    try:
        return frozenset(typing.get_type_hints(registry.config_class(kind, name)))
    except registry.RowError:
        return frozenset()


def as_typed_text(problem: Problem, overrides: list[str]) -> Problem:
    """Return the problem of a value that should be text with the form to type as its fix."""
    for argument in overrides:
        key, sign, value = argument.lstrip("+").partition("=")
        if sign and key == problem.where and problem.rule.startswith(TEXT):
            return dataclasses.replace(problem, fix=_quoted_for_shell(key, value))
    return problem


def _as_text(argument: str) -> str:
    """Return `key='value'` if the key takes text, else ""."""
    key, sign, value = argument.partition("=")
    name = KEY.fullmatch(key)
    if not (sign and name and any(_takes_text(kind) for kind in kinds_of(name[1]))):
        return ""
    return f"{key}={_quoted(value)}"


def _quoted(value: str) -> str:
    """Return a value between quotes as Hydra reads them: backslashes count before quotes only."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", r"\'"), value) + "'"


def _quoted_for_shell(key: str, value: str) -> str:
    bare = value[1:-1] if value[:1] == value[-1:] == '"' else value
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', r"\""), bare)
    return shlex.quote(f'{key}="{escaped}"')


def _unreadable(argument: str) -> Problem:
    key, sign, value = argument.partition("=")
    name = KEY.fullmatch(key)
    if not (sign and name):
        return Problem(repr(argument), "an argument that cannot be read", "key=value", "see --help")
    rule = "a value as Hydra reads it: a number, a word, [a,b], {a: b}, or text in quotes"
    fix = _quoted_for_shell(key, value)
    if value[:1] + value[-1:] == "()":
        fix = f"{key}=[{value[1:-1]}]"
    return Problem(name[1], repr(value), rule, fix)


def kinds_of(key: str) -> list[Any]:
    """Return the types that a key such as `model.depth` may have: of one section per choice."""
    kinds: list[Any] = [RunConfig]
    for part in key.split("."):
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return kinds


def _inside(kind: Any, part: str) -> Iterator[Any]:
    """Yield the types of one entry of a section or a mapping."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is dict:
        yield typing.get_args(kind)[1]
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        for section in _choices(kind):
            hints = typing.get_type_hints(section, include_extras=True)
            if part in hints:
                yield hints[part]


def _choices(kind: type) -> Iterator[type]:
    """Yield a section itself, or all that can be chosen for it by name."""
    if not issubclass(kind, Named):
        yield kind
        return
    for name in registry.names(kind.kind):
        try:
            yield registry.config_class(kind.kind, name)
        except registry.RowError:  # another package's, and broken: reported when it is chosen
            continue


def _takes_text(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Annotated:
        return _takes_text(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_takes_text(member) for member in typing.get_args(kind))
    return kind is str


def _check_choice(group: str, value: Any, choices: dict[str, list[str]]) -> list[Problem]:
    if isinstance(value, str) and value in choices[group]:
        return []
    listed = ", ".join(choices[group])
    fix = nearest(str(value), choices[group], lambda name: f"{group}={name}")
    if group == "data" and isinstance(value, str) and ("/" in value or Path(value).exists()):
        fix = f"data.path={value}"
    return [Problem(group, repr(value), f"one of {listed}", fix)]
