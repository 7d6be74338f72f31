"""Record a run in JSONL files that are always complete, and feed MLflow from them in a thread.

Training never waits for that thread. `metrics.jsonl` in the stage's folder has one line per step.
After a restart the lines of steps that will be repeated are dropped first, so the file always reads
like an undisturbed run. If MLflow's store fails, the run continues and reports it once; what the
store missed is sent when it answers again, at the next start, or by `python -m wm_train.tracking
replay <folder>`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wm_train.config.curriculum import StagePlan
from wm_train.config.schema import RunConfig
from wm_train.config.typed import from_json, public_config
from wm_train.redact import clean_output, clean_text, clean_value
from wm_train.storage import read_regular
from wm_train.tracking.forwarder import Forwarder
from wm_train.tracking.goodput import begin_life, productive, read_life, write_life
from wm_train.tracking.mlflow_record import ARTIFACTS, EVALUATIONS, METRICS, MlflowRecord, Subject
from wm_train.tracking.rows import read_rows, to_line


class StepLog:
    """Write `metrics.jsonl`: one JSON object per step, in order, each step once.

    dropped: the number of steps after `first_step` that it contained; news: what a person should
    know of what was there, or "".
    """

    def __init__(self, path: Path, first_step: int) -> None:
        rows, damaged = read_rows(path) if path.exists() else ([], [])
        kept = [row for row in rows if row["step"] <= first_step]
        self.dropped = len(rows) - len(kept)
        self.productive_s = sum(map(productive, kept))
        self.news = ""
        if damaged:
            what = f"{len(damaged)} damaged lines (the first is line {damaged[0]}) are left out"
            self.news = f"record: {what}; the file as it was is {_set_aside(path, 'damaged')}"
        elif rows and not kept:
            what = f"begins anew, and {len(rows)} steps were recorded"
            self.news = f"record: {what}; they are kept in {_set_aside(path, 'before')}"
        draft = path.with_suffix(".tmp-rewrite")
        draft.write_text("".join(map(to_line, kept)))
        draft.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._unwritten = b""

    def write(self, row: dict[str, Any]) -> OSError | None:
        """Add a line; return the error if it cannot be written now (a full disk).

        Such lines are kept and written first next time.
        """
        self._unwritten += to_line(row).encode()
        self.productive_s += productive(row)
        return self._flush()

    def _flush(self) -> OSError | None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            return error
        return None

    def close(self) -> OSError | None:
        problem = self._flush()
        os.close(self._file)
        return problem


def _set_aside(path: Path, why: str) -> Path:
    """Copy a record that is about to be rewritten; return the copy."""
    copy = path.with_name(f"{path.name}.{why}-{secrets.token_hex(4)}")
    shutil.copyfile(path, copy)
    return copy


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without damaged lines."""
    return read_rows(path)[0]


@dataclass(frozen=True)
class Note:
    """Note artifacts and evaluations of the stage in `folder`, for MLflow to be fed from."""

    folder: Path
    report: Callable[[str], None] = print

    def artifact(self, path: Path) -> None:
        """Note a file in the folder, or of the run around it, as one of the run's artifacts."""
        self._add(ARTIFACTS, {"path": os.path.relpath(path, self.folder)})

    def evaluation(self, step: int, figures: dict[str, float], tags: dict[str, str]) -> None:
        """Note what an evaluation after finished step `step` has found."""
        row = {"step": step, "time": time.time(), **figures}
        self._add(EVALUATIONS, {"tags": tags, "row": row})

    def _add(self, name: str, line: dict[str, Any]) -> None:
        try:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self.report(f"record: a line of {self.folder / name} is not noted ({error})")


class Tracker:
    """Record steps, artifacts and the end of one stage in files that MLflow is fed from.

    Exists on rank 0 only.
    """

    def __init__(
        self,
        plan: StagePlan,
        folder: Path,
        first_step: int,
        report: Callable[[str], None],
        workers: int = 1,
    ) -> None:
        """Open the record after `first_step`, on `workers` processes."""
        self.folder, self.report = folder, report
        self.note = Note(folder, report)
        self._steps = StepLog(folder / METRICS, first_step)
        if self._steps.news:
            report(self._steps.news)
        self._life = begin_life(folder, self._steps.dropped, first_step, workers)
        self._worked = self._full = False
        self._forwarder: Forwarder | None = None
        if plan.tracker.name == "mlflow":
            names = (plan.run, plan.pool, plan.stage)
            record = MlflowRecord(
                Subject(*names, plan.tracker, plan.out, plan.record), folder, report
            )
            record.rewind(first_step)
            self._forwarder = Forwarder(record, report)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of finished step `step` (counted from 1): one line, no waiting."""
        problem = self._steps.write({"step": step, "time": time.time(), **figures})
        if problem is not None and not self._full:
            self.report(
                f"record: cannot write {self.folder / METRICS} ({problem}). Its lines are kept"
                " until it can. Fix: make room"
            )
        self._worked, self._full = True, problem is not None

    def rewind(self, step: int) -> None:
        """Drop the record after `step`, as these steps will be repeated."""
        self._steps.close()
        self._steps = StepLog(self.folder / METRICS, step)
        self._life = replace(self._life, redone_steps=self._life.redone_steps + self._steps.dropped)
        if self._forwarder is not None:
            self._forwarder.record.rewind(step)

    def artifact(self, path: Path) -> None:
        """Record a file in the stage's folder as one of the run's artifacts."""
        self.note.artifact(path)

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """End the run as FINISHED, FAILED or KILLED, record its goodput and send the rest."""
        problem = self._steps.close()
        if self._worked or status != "FINISHED":
            spent = self._steps.productive_s
            self._life = replace(self._life, status=status, ended=time.time(), productive_s=spent)
            self.report(str(self._life))
        else:  # there was nothing to do
            self._life = replace(self._life, status=status)
        try:
            write_life(self.folder, self._life)
        except OSError as error:
            problem = problem or error
        if problem is not None:
            self.report(f"record: the last lines of {self.folder / METRICS} are lost ({problem})")
        if self._forwarder is not None:
            self._forwarder.close(status, timeout_s)


def subject_of(run: RunConfig, stage: str) -> Subject:
    """Return a stage of a run as its record calls it; "" for the run of all pools."""
    return Subject(run.name, run.pool, stage, run.tracker, Path(run.out), public_config(run))


def parent_run(
    run: RunConfig, folder: Path, report: Callable[[str], None], status: str | None = None
) -> str | None:
    """Return the MLflow run that contains the pools' runs, remembered in `folder`.

    It is ended if `status` gives an end. Returns None without a tracker or when its store fails.
    """
    if run.tracker.name != "mlflow":
        return None
    record = MlflowRecord(subject_of(run, ""), folder, report)
    try:
        record.catch_up(status)
    except Exception as error:  # of whatever library: a tracking store must not stop training
        report(
            f"MLflow at {record.shown_uri} failed, the run of all pools misses what it would have"
            f" said ({record.first_line(error)})"
        )
        return None
    return record.run_id


def send(subject: Subject, folder: Path, report: Callable[[str], None]) -> None:
    """Send what the store lacks of a stage that has ended; a store that fails is reported."""
    record = MlflowRecord(subject, folder, report)
    try:
        record.catch_up()
    except Exception as error:  # of whatever library: the files are complete without it
        report(f"MLflow at {record.shown_uri} failed ({record.first_line(error)}); replay sends it")


def send_file(run: RunConfig, folder: Path, file: Path) -> None:
    """Send a file of a run to MLflow, if it tracks it, as an artifact of the stage in `folder`,
    which has ended."""
    if run.tracker.name == "mlflow" and file.is_file() and folder.is_dir():
        Note(folder).artifact(file)
        send(subject_of(run, folder.name), folder, print)


def where_to_look(run: RunConfig) -> str:
    """Return where MLflow keeps a run, with the command or the place to look at it."""
    uri: str = clean_value(subject_of(run, "").uri)
    protocol = uri.partition("://")[0].lower() if "://" in uri else "file"
    if protocol in ("http", "https"):
        return f"{uri}  (open it in a browser)"
    if protocol.partition("+")[0] not in ("file", "sqlite", "postgresql", "mysql", "mssql"):
        return uri
    show = f"mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"
    return f"{uri}  (to look at it: pip install mlflow; {show})"


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """Run `python -m wm_train.tracking replay <folder>`; exit code 1 when the store still fails."""
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.tracking", description="The record of a stage."
    )
    command = parser.add_subparsers(dest="command", required=True, metavar="command").add_parser(
        "replay",
        help="send to MLflow what its store does not have yet",
        description="Send to MLflow what its store does not have yet.",
    )
    command.add_argument("folder", type=Path, nargs="+", help="<out>/<name>/<stage>, one or more")
    command.add_argument("--uri", help="another store than the run's")
    command.add_argument("--experiment", help="another experiment than the run's")
    arguments = parser.parse_args(argv)
    for folder in arguments.folder:
        record = None
        try:
            run = from_json(read_regular(folder / "config.json").decode())
            subject = subject_of(run, folder.name)
            given = {key: getattr(arguments, key) for key in ("uri", "experiment")}
            tracker = replace(subject.tracker, **{k: v for k, v in given.items() if v})
            record = MlflowRecord(replace(subject, tracker=tracker), folder, print)
            life = read_life(folder)
            steps = record.catch_up(life.status if life and life.status != "RUNNING" else None)
        except (
            Exception
        ) as error:  # a missing file, or any failure of whatever library the store uses
            why = record.first_line(error) if record else f"{type(error).__name__}: {error}"
            print(f"replay of {folder}: {clean_text(why)}", file=sys.stderr)
            return 1
        print(f"{folder}: {steps} steps sent")
    return 0
