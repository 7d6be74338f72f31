"""Turn plain mappings into `RunConfig`, each choice by its `name`, and back into JSON.

A stage's `model`, `data`, `parallel` and `trainer` are merged over the run's before typing, so a
stage may change any key of them. Every mistake is noted under its full key, once: what is wrong in
the run's own section is not repeated for each stage. A hand-written converter stands here although
pydantic is at hand: unions whose members come from entry points, merged sections and our report
would need as much code around it as the conversion itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from wm_train.config import registry
from wm_train.config.kinds import Named
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.rules import broken_rules
from wm_train.config.schema import PER_STAGE, RunConfig
from wm_train.redact import clean_value

MISSING = "???"
UNKNOWN = "an unknown key"
CHOICES = "one of "  # starts the rule of a name, and of nothing else here


def build(plain: Any) -> RunConfig:
    """Return the typed configuration of plain mappings.

    Raises ConfigError with every unknown key, wrong type, missing value and unknown name.
    """
    plain = with_whole_stages(without_absent(plain))
    problems: list[Problem] = []
    config = _convert(RunConfig, plain, "", problems)
    if problems:
        raise ConfigError(reported_once(problems), _rest(plain, problems))
    built: RunConfig = config
    return built


def build_section(kind: type, plain: Any, where: str) -> Any:
    """Return one typed section, such as the model that a checkpoint names, and check its rules.

    Raises ConfigError with everything that is wrong.
    """
    problems: list[Problem] = []
    section = _convert(kind, plain, where, problems)
    if not problems:
        problems = [problem.under(f"{where}.") for problem in broken_rules(section)]
    if problems:
        raise ConfigError(problems)
    return section


def _rest(plain: Any, problems: Sequence[Problem]) -> RunConfig | None:
    """Return the configuration without its unknown keys and with the first row's choice where a
    name is unknown; None where anything else is wrong, too."""
    while problems:
        curable = {p.where for p in problems if p.got == UNKNOWN or p.rule.startswith(CHOICES)}
        if len(curable) < len(problems):
            return None
        plain, problems = _without(plain, curable), []
        rest: RunConfig | None = _convert(RunConfig, plain, "", problems)
    return rest


def without_absent(plain: Any) -> Any:
    """Return the mappings without the stages that are null, which an experiment leaves out."""
    if not (isinstance(plain, Mapping) and _stages(plain)):
        return plain
    stages = {name: stage for name, stage in _stages(plain).items() if stage is not None}
    return {**plain, "recipe": {**plain["recipe"], "stages": stages}}


def with_whole_stages(plain: Any) -> Any:
    """Return the mappings with each stage's sections whole: the run's, and its own keys over them.

    A stage whose model has another name than the run's shares nothing with it.
    """
    if not (isinstance(plain, Mapping) and _stages(plain)):
        return plain
    stages = {name: _whole(plain, stage) for name, stage in plain["recipe"]["stages"].items()}
    stages = {name: _with_whole_roles(stages, name) for name in stages}
    return {**plain, "recipe": {**plain["recipe"], "stages": stages}}


def _whole(run: Mapping[str, Any], stage: Any) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    merged = dict(stage)
    for section in PER_STAGE:
        base, own = run.get(section, {}), stage.get(section, {})
        if not (isinstance(base, Mapping) and isinstance(own, Mapping)):
            continue  # reported as what it is, where it stands
        another = section == "model" and own.get("name", base.get("name")) != base.get("name")
        merged[section] = dict(own) if another else {**base, **own}
    return merged


def _with_whole_roles(stages: Mapping[str, Any], name: str) -> Any:
    """Return a stage whose roles have whole models, as `RoleConfig` says."""
    stage = stages[name]
    if not isinstance(stage, Mapping):
        return stage
    whole, job = dict(stage), stage.get("trajectories")
    if isinstance(stage.get("roles"), Mapping):
        whole["roles"] = _whole_roles(stages, name)
    if isinstance(job, Mapping) and "teacher" in job:
        alone = {**stages, name: {**stage, "roles": {"teacher": job["teacher"]}}}
        whole["trajectories"] = {**job, **_whole_roles(alone, name)}
    return whole


def _whole_roles(stages: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        role: {**given, "model": _role_model(stages, name, role, ())}
        if isinstance(given, Mapping)
        else given
        for role, given in stages[name]["roles"].items()
    }


def _role_model(stages: Mapping[str, Any], name: str, role: str, seen: tuple[Any, ...]) -> Any:
    """Return the model of a stage's role, plain, whole as far as the stages can be read."""
    stage = stages.get(name)
    if not isinstance(stage, Mapping):
        return {}
    roles = stage.get("roles")
    given = roles.get(role) if isinstance(roles, Mapping) else None
    if not isinstance(given, Mapping) or (name, role) in seen:  # the student, or a circle
        return stage.get("model", {})
    source = stage_named(stages, name, given.get("inherit"))
    whose = given.get("inherit_role", "student")
    base = _role_model(stages, source or name, whose if source else "", (*seen, (name, role)))
    own = given.get("model", {})
    if not (isinstance(base, Mapping) and isinstance(own, Mapping)):
        return own
    another = own.get("name", base.get("name")) != base.get("name")
    return dict(own) if another else {**base, **own}


def stage_named(stages: Mapping[str, Any], name: str, inherit: Any) -> str | None:
    """Return the stage that `inherit` of stage `name` names, plain or typed, or None."""
    if inherit != "previous":
        return inherit if isinstance(inherit, str) and inherit in stages else None

    def index(stage: Any) -> Any:
        return stage.get("index") if isinstance(stage, Mapping) else stage.index

    numbers = {other: index(stage) for other, stage in stages.items()}
    if not all(isinstance(number, int) for number in numbers.values()):
        return None  # reported as what they are
    before = [other for other in numbers if numbers[other] < numbers[name]]
    return max(before, key=lambda other: numbers[other], default=None)


def _stages(plain: Any) -> Mapping[str, Any]:
    recipe = plain.get("recipe") if isinstance(plain, Mapping) else None
    stages = recipe.get("stages") if isinstance(recipe, Mapping) else None
    return stages if isinstance(stages, Mapping) else {}


def _without(plain: Any, keys: Iterable[str], where: str = "") -> Any:
    """Return the mappings without the entries of these full keys."""
    if not isinstance(plain, Mapping):
        return plain
    full = {key: f"{where}.{key}".lstrip(".") for key in plain}
    return {key: _without(v, keys, full[key]) for key, v in plain.items() if full[key] not in keys}


def run_level(where: str) -> str:
    """Return the run's key that a stage's key repeats: recipe.stages.long.model.depth ->
    model.depth; "" for a key that only stages have."""
    parts = where.split(".")
    inside = parts[:2] == ["recipe", "stages"] and len(parts) > 4 and parts[3] in PER_STAGE
    return ".".join(parts[3:]) if inside else ""


def reported_once(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems without those of stages that only repeat one of the run's sections."""
    listed = list(problems)
    own = {(problem.where, problem.got) for problem in listed if not run_level(problem.where)}
    return [p for p in listed if (run_level(p.where), p.got) not in own]


def to_json(config: RunConfig) -> str:
    """Return the resolved config as stored with the run; null stays null."""
    return json.dumps(dataclasses.asdict(config), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> RunConfig:
    """Return the config that `to_json` wrote. Raises ConfigError for anything else."""
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        got = f"text that is no JSON ({error})"
        problem = Problem("resolved config", got, "what wm_train.launch wrote")
        raise ConfigError([problem]) from error
    return build(plain)


def public_config(config: RunConfig) -> dict[str, Any]:
    """Return the config as it may be stored and shown, without secrets."""
    plain: dict[str, Any] = clean_value(dataclasses.asdict(config))
    return plain


def nearest(name: str, names: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Return the name that was probably meant, as `show` writes it; "" if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return show(close[0]) if close else ""


def _convert(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    """Return `value` as type `kind`; note a mismatch under its full key and return None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _convert(arguments[0], value, where, problems)
    if isinstance(value, str) and value == MISSING:
        missing = Problem(where, "nothing", f"a value: {_describe(kind)}", f"{where}=<value>")
        problems.append(missing)
        return None
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where, problems)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(kind, value, where, problems)
    if origin is dict and isinstance(value, Mapping):
        return {
            str(key): _convert(arguments[1], item, f"{where}.{key}", problems)
            for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        endless = arguments[-1] is Ellipsis
        if endless or len(arguments) == len(value):
            kinds = [arguments[0]] * len(value) if endless else arguments
            return tuple(
                _convert(inner, item, f"{where}.{index}", problems)
                for index, (inner, item) in enumerate(zip(kinds, value, strict=True))
            )
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass  # an integer beyond 1e308 is no float: reported below
    if kind in (int, bool, str) and type(value) is kind:
        return value
    if kind is str and where == "stage" and type(value) is int:
        return str(value)  # `stage=2` is the usual way to write it
    fix = ""
    if kind is int and isinstance(value, float) and value.is_integer():
        fix = f"{where}={int(value)}"
    elif kind is str and isinstance(value, int | float):
        fix = f"""'{where}="{value}"'"""
    problems.append(Problem(where or "config", _show(value), _describe(kind), fix))
    return None


def _convert_union(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    """Return `value` as the member of a union that takes it: null, or the first that fits."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if value is None and len(members) < len(typing.get_args(kind)):
        return None
    for member in members:
        tried: list[Problem] = []
        converted = _convert(member, value, where, tried)
        if not tried:
            return converted
        if len(members) == 1:
            problems += tried
            return None
    problems.append(Problem(where, _show(value), _describe(kind)))
    return None


def _convert_dataclass(kind: Any, value: Any, where: str, problems: list[Problem]) -> Any:
    prefix = f"{where}." if where else ""
    if not isinstance(value, Mapping):
        keys = ", ".join(field.name for field in dataclasses.fields(kind))
        problem = Problem(where or "config", _show(value), f"a mapping with the keys {keys}")
        problems.append(problem)
        return None
    if issubclass(kind, Named):
        chosen = _chosen(kind, value, prefix, problems)
        if chosen is None:
            return None
        kind = chosen
    hints = typing.get_type_hints(kind, include_extras=True)
    problems += [_unknown_key(kind, str(key), prefix, hints) for key in value if key not in hints]
    before = len(problems)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], prefix + field.name
        given = (field.default, field.default_factory)
        has_default = any(default is not dataclasses.MISSING for default in given)
        if field.name in value:
            values[field.name] = _convert(hint, value[field.name], key, problems)
        elif dataclasses.is_dataclass(hint) and not has_default:
            values[field.name] = _convert(hint, {}, key, problems)
        elif not has_default or field.default == MISSING:
            rule = f"a value: {_describe(hint)}"
            problems.append(Problem(key, "nothing", rule, f"{key}=<value>"))
    return kind(**values) if len(problems) == before else None


def _chosen(
    kind: type[Named], value: Mapping[str, Any], prefix: str, problems: list[Problem]
) -> type | None:
    """Return the class that `name` chooses; note a name that is unknown, or cannot be imported."""
    names = registry.names(kind.kind)
    name = value.get("name", names[0])
    if name not in names:
        fix = nearest(str(name), names, lambda close: f"{prefix}name={close}")
        rule = f"{CHOICES}{', '.join(names)}"
        problems.append(Problem(f"{prefix}name", repr(name), rule, fix))
        return None
    try:
        found: type[Named] = registry.config_class(kind.kind, name)
        if registry.leads_nowhere(found.builds):
            raise registry.RowError(f"{name!r}, whose {found.builds} is not there")
    except registry.RowError as error:
        rule = "a name that one installed and whole package offers"
        fix = f"mend or uninstall a package that offers it (entry point group wm_train.{kind.kind})"
        problems.append(Problem(f"{prefix}name", str(error), rule, fix))
        return None
    return found


def _unknown_key(kind: type, key: str, prefix: str, hints: Mapping[str, Any]) -> Problem:
    """Return the problem of a key that the section does not have, with the likeliest cure."""
    close = nearest(key, hints, lambda name: f"{prefix}{name}")
    fix = f"did you mean {close}?" if close else f"keys here: {', '.join(hints)}"
    if issubclass(kind, Named):
        others = [name for name in registry.names(kind.kind) if _has_key(kind.kind, name, key)]
        if others:
            fix = f"leave it out; it is a key of {', '.join(others)} ({prefix}name={others[0]})"
    return Problem(f"{prefix}{key}", UNKNOWN, "a key that this section declares", fix)


def _has_key(kind: str, name: str, key: str) -> bool:
    try:
        return key in typing.get_type_hints(registry.config_class(kind, name))
    except registry.RowError:
        return False  # another package's, and broken


def _show(value: Any) -> str:
    text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 120 else f"{text[:110]}... ({type(value).__name__})"


def _describe(kind: Any) -> str:
    """Return a type in a user's words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _describe(a) for a in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: [{', '.join(_describe(a) for a in arguments)}]"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
