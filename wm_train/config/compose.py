"""Compose a command line into `RunConfig`: Hydra merges YAML and overrides, `typed` does the rest.

Every mistake is collected as a `Problem` and raised at once in one `ConfigError`. A key that no
section declares is a problem, so `_target_` means nothing here, and only plain references
(`${recipe.name}`) are resolved: `${oc.env:...}` would write secrets into the stored config. The
worker reads the same tree back with `typed.from_json`, without importing Hydra.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wm_train.config.overrides import as_typed_text, drop_replaced, read_overrides
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import RunConfig
from wm_train.config.typed import build
from wm_train.config.yaml_files import yaml_problems

DEMO = ("experiment=demo", "recipe=sana_wm")
NOT_DEMO = ("experiment", "recipe", "model", "data", "data.path")  # keys that choose another run
DEMO_LINE = (
    f"the demo, SANA-WM at toy size ({' '.join(DEMO)}), as neither experiment, recipe, model nor"
    " data.path is given"
)


def is_demo(overrides: Iterable[str]) -> bool:
    """Return whether these overrides leave open what is trained, so that it is the demo."""
    return not any(text.partition("=")[0].lstrip("+~") in NOT_DEMO for text in overrides)


def with_demo(overrides: Iterable[str]) -> list[str]:
    """Return the overrides, behind those of the demo where they leave open what is trained."""
    given = list(overrides)
    return [*DEMO, *given] if is_demo(given) else given


def config_directory() -> Path:
    """Return the folder with config.yaml: inside the installed package, or at the root of a
    checkout."""
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
    """Return group name -> its choices, over all folders; reads names only."""
    files: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            files.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(choices) for name, choices in sorted(files.items())}


def compose(overrides: Iterable[str], extra: Path | None = None) -> RunConfig:
    """Compose overrides such as `experiment=demo model.depth=8` into a typed config.

    Values are checked later, in `wm_train.checks`. `extra`: a folder of the user's with the same
    groups as configs/. Raises ConfigError with all problems.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        Path.cwd()
    except OSError as error:
        got = "a folder that was deleted"
        problem = Problem("working directory", got, "one that exists", "cd to another folder")
        raise ConfigError([problem]) from error
    folders = [config_directory(), *([extra.resolve()] if extra else [])]
    given = with_demo(overrides)
    lines, problems = read_overrides(given, groups(folders))
    if extra and not extra.is_dir():
        problems.append(Problem("--config-dir", str(extra), "an existing folder"))
    problems += yaml_problems(extra) if extra else []
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
    drop_replaced(plain, lines)
    if problems:
        raise ConfigError([*problems, *(p for p in _others(plain) if "${" not in p.got)])
    try:
        return build(plain)
    except ConfigError as error:
        problems = [as_typed_text(problem, given) for problem in error.problems]
        raise ConfigError(problems, error.rest) from None


def _resolver_calls(value: Any, where: str) -> list[Problem]:
    """Return problems of values such as `${name:...}`, which call code or read the environment;
    only references to other keys are allowed."""
    if isinstance(value, Mapping):
        return [
            problem
            for key, item in value.items()
            for problem in _resolver_calls(item, f"{where}.{key}".lstrip("."))
        ]
    if isinstance(value, list):
        return [
            problem
            for index, item in enumerate(value)
            for problem in _resolver_calls(item, f"{where}.{index}")
        ]
    if isinstance(value, str) and "${" in value and ":" in value.split("${", 1)[1]:
        rule = (
            "a plain value or a reference ${other.key}; resolvers would store secrets with the run"
        )
        return [Problem(where, repr(value), rule, "let the shell fill it in: key=$VALUE")]
    return []


def _translate(error: Exception) -> Problem:
    """Convert exceptions of Hydra and OmegaConf to a Problem: their first line is the message, with
    the key if they contain it."""
    where = str(getattr(error, "full_key", "") or "overrides")
    return Problem(
        where,
        str(error).strip().split("\n")[0] or type(error).__name__,
        "a configuration that composes",
        "see --help",
    )


def _others(plain: Any) -> tuple[Problem, ...]:
    """Return the problems of typing these mappings."""
    try:
        build(plain)
    except ConfigError as error:
        return error.problems
    return ()
