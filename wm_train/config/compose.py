"""Command line -> `RunConfig`: Hydra composes YAML and overrides, the result becomes frozen
dataclasses, nothing else sees a DictConfig.

Every mistake is collected as a `Problem` and raised at once in one `ConfigError`. A key that
`config.py` does not declare is a problem, so `_target_` means nothing here, and only plain
references (`${recipe.name}`) are resolved: `${oc.env:...}` would write secrets into the stored
config. The worker reads the same tree back with `from_json`, without importing Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from wm_train.config.schema import RunConfig

MISSING = "???"
UNKNOWN = "an unknown key"


@dataclass(frozen=True)
class Problem:
    """One mistake: the key, what stands there, what would be right, and what to type."""

    where: str
    got: str
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: got {self.got}, expected {self.rule}" + (
            f". Fix: {self.fix}" if self.fix else ""
        )


class ConfigError(ValueError):
    """All problems of one configuration; `str()` is the report that a user sees.

    `rest`: the configuration without its unknown keys, where these are all that is wrong so far:
    its values can still be checked.
    """

    def __init__(self, problems: Iterable[Problem], rest: RunConfig | None = None) -> None:
        self.problems = tuple(problems)
        self.rest = rest
        super().__init__(report(self.problems))


def report(problems: Iterable[Problem]) -> str:
    """The one report of all problems, two lines each."""
    listed = list(problems)
    lines = [
        f"{len(listed)} problem{'s' if len(listed) != 1 else ''} in the configuration; nothing was"
        " started."
    ]
    for number, problem in enumerate(listed, 1):
        lines.append(f"  {number}. {problem.where}: got {problem.got}, expected {problem.rule}")
        if problem.fix:
            lines.append(f"     Fix: {problem.fix}")
    return "\n".join(lines)


def config_directory() -> Path:
    """The folder with config.yaml: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        [
            Problem(
                "configs",
                "no config.yaml beside the package",
                "a complete installation",
                "install wm-train again",
            )
        ]
    )


def groups(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Group name -> its choices, over all folders; reads names only."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(choices) for name, choices in sorted(found.items())}


def compose(overrides: Iterable[str], extra: Path | None = None) -> RunConfig:
    """Overrides such as `experiment=demo model.depth=8` -> config of the right types; values are
    checked by `validate`.

    `extra`: a folder of one's own with the same groups as configs/. Raises ConfigError with all
    problems.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    folders = [config_directory(), *([extra.resolve()] if extra else [])]
    lines, problems = _read_overrides(list(overrides), groups(folders))
    if extra and not extra.is_dir():
        problems.append(Problem("--config-dir", str(extra), "an existing folder"))
    if problems:
        raise ConfigError(problems)
    if extra:
        lines.append(f"hydra.searchpath=[{json.dumps(folders[1].as_uri())}]")
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3", job_name="wm_train"):
            composed = hydra_compose("config", lines)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_translate(error)]) from error
    except (
        YAMLError,
        UnicodeDecodeError,
        OSError,
    ) as error:  # a file of one's own that is no plain YAML
        raise ConfigError(
            [
                Problem(
                    "--config-dir",
                    " ".join(str(error).split()),
                    "files of plain YAML, without tags",
                )
            ]
        ) from error
    raw = OmegaConf.to_container(composed, resolve=False)
    problems = _resolver_calls(raw, "")
    try:
        plain = OmegaConf.to_container(composed, resolve=True) if not problems else raw
    except OmegaConfBaseException as error:
        plain = raw
        problems.append(_translate(error))
    if problems:
        others: list[Problem] = []
        _convert(RunConfig, plain, "", others)
        raise ConfigError([*problems, *(problem for problem in others if "${" not in problem.got)])
    return build(plain)


def build(plain: Any) -> RunConfig:
    """Plain mappings -> RunConfig. Raises ConfigError with every unknown key, wrong type and
    missing value."""
    problems: list[Problem] = []
    config = _convert(RunConfig, plain, "", problems)
    if problems:
        unknown = [problem.where for problem in problems if problem.got == UNKNOWN]
        rest = (
            _convert(RunConfig, _without(plain, unknown), "", [])
            if len(unknown) == len(problems)
            else None
        )
        raise ConfigError(problems, rest)
    return config


def _without(plain: Any, keys: Iterable[str], where: str = "") -> Any:
    """Plain mappings without the entries of these full keys."""
    if not isinstance(plain, Mapping):
        return plain
    full = {key: f"{where}.{key}".lstrip(".") for key in plain}
    return {
        key: _without(item, keys, full[key]) for key, item in plain.items() if full[key] not in keys
    }


def to_json(config: RunConfig) -> str:
    """The resolved config as stored with the run; null stays null."""
    return json.dumps(dataclasses.asdict(config), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> RunConfig:
    """What `to_json` wrote. Raises ConfigError for anything else."""
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            [
                Problem(
                    "resolved config",
                    f"text that is no JSON ({error})",
                    "what wm_train.launch wrote",
                )
            ]
        ) from error
    return build(plain)


def public_config(config: RunConfig) -> dict[str, Any]:
    """The config as it may be stored and shown: user names and passwords are taken out of
    addresses."""
    return json.loads(
        json.dumps(dataclasses.asdict(config)),
        object_hook=lambda d: {k: without_login(v) for k, v in d.items()},
    )


def without_login(value: Any) -> Any:
    """An address without the user name and password in it; anything else as it is."""
    if isinstance(value, str) and "://" in value and "@" in value:
        parts = urlsplit(value)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return value


def _read_overrides(
    overrides: list[str], choices: dict[str, list[str]]
) -> tuple[list[str], list[Problem]]:
    """Check each override by itself; values become `++key=value`, so that unknown keys reach
    `_convert`, which lists them all."""
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
            problems.append(
                Problem(repr(text), "an argument that cannot be read", "key=value", "see --help")
            )
            continue
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            problems.append(
                Problem(
                    key,
                    repr(text),
                    "a key of wm_train; Hydra itself has no settings here",
                    "leave it out",
                )
            )
        elif override.is_sweep_override():
            problems.append(
                Problem(
                    key,
                    repr(text),
                    "one value; a command runs one configuration",
                    "start one command per value",
                )
            )
        elif override.type == OverrideType.DEL:
            if key in choices:
                problems.append(
                    Problem(
                        key,
                        repr(text),
                        f"one of {', '.join(choices[key])}; a group cannot be left out",
                        f"{key}=<choice>",
                    )
                )
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


def _check_choice(group: str, value: Any, choices: dict[str, list[str]]) -> list[Problem]:
    if isinstance(value, str) and value in choices[group]:
        return []
    listed = ", ".join(choices[group])
    fix = _nearest(str(value), choices[group], lambda name: f"{group}={name}")
    if group == "data" and isinstance(value, str) and ("/" in value or Path(value).exists()):
        fix = f"data.path={value}"
    return [Problem(group, repr(value), f"one of {listed}", fix)]


def _nearest(name: str, names: Iterable[str], show: Any = str) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return show(close[0]) if close else ""


def _resolver_calls(value: Any, where: str) -> list[Problem]:
    """`${name:...}` calls code or reads the environment; only references to other keys are
    allowed."""
    if isinstance(value, Mapping):
        return [
            found
            for key, item in value.items()
            for found in _resolver_calls(item, f"{where}.{key}".lstrip("."))
        ]
    if isinstance(value, list):
        return [
            found
            for index, item in enumerate(value)
            for found in _resolver_calls(item, f"{where}.{index}")
        ]
    if isinstance(value, str) and "${" in value and ":" in value.split("${", 1)[1]:
        rule = (
            "a plain value or a reference ${other.key}; resolvers would store secrets with the run"
        )
        return [Problem(where, repr(value), rule, "let the shell fill it in: key=$VALUE")]
    return []


def _translate(error: Exception) -> Problem:
    """Hydra's and OmegaConf's exceptions as a Problem: their first line says what, and where if
    they know."""
    where = str(getattr(error, "full_key", "") or "overrides")
    return Problem(
        where,
        str(error).strip().split("\n")[0] or type(error).__name__,
        "a configuration that composes",
        "see --help",
    )


def _convert(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    """`value` as type `kind`; a mismatch is noted under its full key and None returned."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, str) and value == MISSING:
        problems.append(
            Problem(where, "nothing", f"a value: {_describe(kind)}", f"{where}=<value>")
        )
        return None
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where, problems)
    if origin in (types.UnionType, typing.Union):
        member = _member_for(arguments, value)
        return None if value is None else _convert(member, value, where, problems)
    if origin is dict and isinstance(value, Mapping):
        return {
            str(key): _convert(arguments[1], item, f"{where}.{key}", problems)
            for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(
                _convert(arguments[0], item, f"{where}.{index}", problems)
                for index, item in enumerate(value)
            )
        if len(arguments) == len(value):
            return tuple(
                _convert(inner, item, f"{where}.{index}", problems)
                for index, (inner, item) in enumerate(zip(arguments, value))
            )
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass  # an integer beyond 1e308 is no float: reported below
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is str and where == "stage" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # `stage=2` is how everybody writes it
    fix = ""
    if kind is int and isinstance(value, float) and value.is_integer():
        fix = f"{where}={int(value)}"
    elif kind is str and isinstance(value, int | float):
        fix = f"""'{where}="{value}"'"""
    problems.append(Problem(where or "config", _show(value), _describe(kind), fix))
    return None


def _member_for(members: Iterable[Any], value: Any) -> Any:
    """Return the type of a union to read `value` as: for a list its list type, else the first."""
    present = [member for member in members if member is not type(None)]
    is_list = isinstance(value, list | tuple)
    fitting = (member for member in present if (typing.get_origin(member) is tuple) == is_list)
    return next(fitting, present[0])


def _convert_dataclass(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(
            Problem(
                where or "config",
                _show(value),
                f"a mapping with the keys {', '.join(f.name for f in dataclasses.fields(kind))}",
            )
        )
        return None
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            nearest = _nearest(str(key), hints, lambda name: f"{prefix}{name}")
            fix = f"did you mean {nearest}?" if nearest else f"keys here: {', '.join(hints)}"
            problems.append(
                Problem(
                    f"{prefix}{key}", UNKNOWN, "a key that wm_train/config/schema.py declares", fix
                )
            )
    before = len(problems)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if field.name in value:
            found[field.name] = _convert(
                hints[field.name], value[field.name], prefix + field.name, problems
            )
        elif dataclasses.is_dataclass(hints[field.name]) and not has_default:
            found[field.name] = _convert(hints[field.name], {}, prefix + field.name, problems)
        elif not has_default or field.default == MISSING:
            problems.append(
                Problem(
                    prefix + field.name,
                    "nothing",
                    f"a value: {_describe(hints[field.name])}",
                    f"{prefix}{field.name}=<value>",
                )
            )
    return kind(**found) if len(problems) == before else None


def _show(value: Any) -> str:
    text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 120 else text[:110] + "... (" + type(value).__name__ + ")"


def _describe(kind: Any) -> str:
    """A type in a user's words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(
            "null" if argument is type(None) else _describe(argument) for argument in arguments
        )
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return (
            f"a list of {len(arguments)}:"
            f" [{', '.join(_describe(argument) for argument in arguments)}]"
        )
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
