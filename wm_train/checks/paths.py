"""Check the paths of a configuration as text, before anything is looked for or made there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wm_train.config.problems import Problem
from wm_train.config.schema import StageConfig

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # s3://bucket, and s3:/bucket of a slip
SHIPPED = "/runtime_resources/working_dir_files/"  # where Ray puts the folder of a submitted job
LOCAL = ("data.cache", "parallel.nvme_path")  # on a disk of the machine, also in a job


def path_problems(out: str, run: Any, stages: Mapping[str, StageConfig]) -> Iterator[Problem]:
    """Yield paths that no shell has expanded, that would break lines, that are addresses where only
    a folder will do, and relative ones in a job whose folder Ray deletes.

    run: has the run's sections.
    """
    whole = dict(_paths("", run))
    for key, value in [("out", out), *whole.items(), *_of_stages(stages, whole)]:
        name = key.split(".", 3)[-1] if key.startswith("recipe.stages.") else key
        if not _decoded(value).isprintable():
            yield Problem(key, repr(value), "a path of printable letters on one line")
        elif value.startswith("~"):
            rule = "a path from / or relative; only a shell expands ~, and it did not"
            yield Problem(key, value, rule, f"{key}={os.path.expanduser(value)}")
        elif (name == "out" or name in LOCAL) and ADDRESS.match(value):
            yield _no_address(key, value)
        elif name not in LOCAL and SHIPPED in f"{Path.cwd()}/" and _is_relative(value):
            rule = (
                "an absolute path, as the folder that was shipped with this job is a copy, and Ray"
                " deletes it"
            )
            yield Problem(key, value, rule, f"{key}=/<shared folder>/{value}")
    kept_here = run.tracker.name == "mlflow" and run.tracker.uri is None
    if kept_here and set("?%") & {*str(Path(out).absolute())}:
        # options would begin, or letters be decoded: the record would be kept in another file
        rule = "a path without ? and %, as MLflow keeps its database there under an address"
        yield Problem("out", out, rule, "out=<another folder>, or tracker.uri=<a store>")


def _decoded(path: str) -> str:
    """Return a path whose bytes are read as UTF-8; Python in the C locale keeps those of a command
    line beyond ASCII as surrogates. Bytes that are no UTF-8 stay such."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _paths(prefix: str, sections: Any) -> Iterator[tuple[str, str]]:
    """Yield key -> path of a run's or a stage's sections, without those that are null."""
    data, trainer = sections.data, sections.trainer
    named = {
        "data.path": data.path,
        "data.cache": data.cache,
        "parallel.nvme_path": sections.parallel.nvme_path,
        "trainer.checkpoint_to": trainer.checkpoint_to,
        **{f"data.mixture.{path}": path for path in data.mixture},
        **{f"data.selection.{place}": path for place, path in enumerate(data.selection)},
    }
    yield from ((prefix + key, path) for key, path in named.items() if path is not None)


def _of_stages(
    stages: Mapping[str, StageConfig], whole: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield key -> path of each stage where it has one of its own."""
    for name, stage in stages.items():
        prefix = f"recipe.stages.{name}."
        for key, path in _paths(prefix, stage):
            if whole.get(key.removeprefix(prefix)) != path:
                yield key, path
        if stage.trajectories and stage.trajectories.path is not None:
            yield f"{prefix}trajectories.path", stage.trajectories.path
        if stage.inherit not in (None, "previous"):
            yield f"{prefix}inherit", stage.inherit


def _is_relative(value: str) -> bool:
    return not ADDRESS.match(value) and not Path(value).is_absolute()


def _no_address(key: str, value: str) -> Problem:
    scheme, _, rest = value.partition(":")
    if scheme.lower() == "file":
        return Problem(key, value, "a folder, not an address", f"{key}=/{rest.lstrip('/')}")
    fix = f"{key}=<folder>"
    if key == "out":
        fix = f"out=<folder> trainer.checkpoint_to={value}, which keeps the checkpoints there"
    return Problem(key, value, "a folder of this machine's file systems", fix)
