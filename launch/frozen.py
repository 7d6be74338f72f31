"""Write a job to a file, and run it from there: `python -m launch.frozen job.json`.

This is for drivers that start later and elsewhere. The file holds whole stages, each of one or
several groups of workers, configs included; nothing is looked up again when the job starts. A
driver in a queue cannot always be sent a signal, so it also accepts a file: when that file appears,
the workers save and leave.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import launch
from launch.child import Child
from launch.progress import ProgressView
from launch.screen import LOST_OUTPUT, safe_output
from launch.spec import LaunchSpec, fill

LOOK_S = 1.0
HELD = "held"  # a holder's line
HOLDER_GRACE_S = 5.0  # to give up the folder
FAILED = 1
Stages = Sequence[Mapping[str, LaunchSpec]]


def to_text(launcher: str, stages: Stages) -> str:
    """Return JSON of the stages to run in order, with a launcher that starts workers at once."""
    plain = [{pool: asdict(spec) for pool, spec in stage.items()} for stage in stages]
    return json.dumps({"launcher": launcher, "stages": plain}, default=str, indent=1)


def from_text(text: str) -> tuple[str, list[dict[str, LaunchSpec]]]:
    """Parse the result of `to_text`. Raises ValueError or TypeError for anything else."""
    plain = json.loads(text)
    return plain["launcher"], [
        {pool: _build(LaunchSpec, spec) for pool, spec in stage.items()}
        for stage in plain["stages"]
    ]


def _build(kind: Any, value: Any) -> Any:
    """Convert JSON to the type that a field declares."""
    if typing.get_origin(kind) is types.UnionType:
        return (
            None
            if value is None
            else _build(
                next(part for part in typing.get_args(kind) if part is not type(None)), value
            )
        )
    if is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        return kind(
            **{field.name: _build(hints[field.name], value[field.name]) for field in fields(kind)}
        )
    if kind is Path:
        return Path(value)
    return tuple(value) if typing.get_origin(kind) is tuple else value


def run(launcher: str, stages: Stages) -> int:
    """Run the stages in order; return the exit code of the first that fails, or 0."""
    for stage in stages:
        with ProgressView() as view, contextlib.ExitStack() as held:
            for spec in stage.values():
                spec.config_path.parent.mkdir(parents=True, exist_ok=True)
                view.text(spec.title)
                if spec.holder and (code := hold(spec, view, held)):
                    return code
            code = launch.run(launcher, stage, view)
        if code != 0:
            return code
    return 0


def hold(spec: LaunchSpec, view: ProgressView, held: contextlib.ExitStack) -> int:
    """Run a group's holder until `held` ends; return 0 once it holds the folder, else its exit
    code, with its words shown."""
    child = Child(fill(spec.holder, str(spec.config_path)), spec.environment, spec.directory, None)
    held.callback(child.stop, HOLDER_GRACE_S)
    code: int | None = None
    while code is None:
        lines, code = child.wait(LOOK_S, for_lines=True)
        if code is None and HELD in lines:
            return 0
        for line in lines:
            view.text(line)
    return code or FAILED


def _stop_when(file: Path) -> None:
    # Not before the launcher handles signals: until then a signal would end this process and leave
    # the workers running.
    while not file.exists() or signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job; return its exit code."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m launch.frozen", description=__doc__, formatter_class=plain
    )
    parser.add_argument("job", type=Path)
    parser.add_argument("--stop-file", type=Path, help="save and leave when this file appears")
    options = parser.parse_args(arguments)
    if options.stop_file:
        threading.Thread(target=_stop_when, args=(options.stop_file,), daemon=True).start()
    with safe_output() as output:
        output.note = LOST_OUTPUT
        return run(*from_text(options.job.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
