"""The record of a run: a JSONL file that is always complete, and MLflow fed from it by a thread that training never waits for.

`metrics.jsonl` in the stage's folder has one line per step. After a restart the lines of steps that are done again are dropped first, so
the file always reads like an undisturbed run. MLflow gets the same figures in batches. If its store fails, the run goes on and says so
once; the file still has everything.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from wm_train.config import RunConfig

BATCH_SECONDS = 2.0  # how long figures may wait for company before they are sent


def public_config(run: RunConfig) -> dict[str, Any]:
    """The config as it may be stored and shown: user names and passwords are taken out of addresses."""
    return json.loads(json.dumps(asdict(run)), object_hook=lambda d: {k: _without_login(v) for k, v in d.items()})


def _without_login(value: Any) -> Any:
    if isinstance(value, str) and "://" in value and "@" in value:
        parts = urlsplit(value)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return value


def store_uri(run: RunConfig) -> str:
    """Where MLflow keeps this run: `tracker.uri`, or a SQLite file in the output folder."""
    return run.tracker.uri or f"sqlite:///{Path(run.out).resolve() / 'mlflow.db'}"


class StepLog:
    """`metrics.jsonl`: one JSON object per step, in order, each step once."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [row for row in read_steps(path) if row["step"] <= first_step] if path.exists() else []
        draft = path.with_suffix(".tmp-rewrite")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # only the last line can be cut, and its step will be done again
    return rows


class Tracker:
    """Steps, artifacts and the end of one stage, written to the JSONL file and forwarded to MLflow. Lives on rank 0 only."""

    def __init__(self, run: RunConfig, stage: str, folder: Path, first_step: int, report: Callable[[str], None]) -> None:
        self._steps = StepLog(folder / "metrics.jsonl", first_step)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if run.tracker.name == "mlflow":
            sender = _MlflowSender(run, stage, folder)
            self._thread = threading.Thread(target=_forward, args=(sender, self._queue, report), name="mlflow", daemon=True)
            self._thread.start()

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of finished step `step` (counted from 1)."""
        self._steps.write({"step": step, **figures})
        self._queue.put(("metrics", step, int(time.time() * 1000), figures))

    def artifact(self, path: Path) -> None:
        """Copy a file into the run's artifacts."""
        self._queue.put(("artifact", path))

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Write out what is queued and end the run as FINISHED, FAILED or KILLED."""
        self._steps.close()
        self._queue.put(("end", status))
        if self._thread is not None:
            self._thread.join(timeout_s)


def _forward(sender: _MlflowSender, items: queue.SimpleQueue, report: Callable[[str], None]) -> None:
    """Thread body: gather what arrives within BATCH_SECONDS and send it. A failing store is reported once and given up."""
    try:
        sender.open()
        ended = False
        while not ended:
            batch = [items.get()]
            until = time.monotonic() + BATCH_SECONDS
            while batch[-1][0] != "end" and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(items.get(timeout=left))
                except queue.Empty:
                    break
            ended = batch[-1][0] == "end"
            sender.send(batch)
    except Exception as error:  # any failure of a tracking store, of whatever library, must not stop training
        report(f"MLflow at {_without_login(sender.uri)} failed, the run goes on without it ({type(error).__name__}: {error}). "
               f"Every figure is in {sender.folder / 'metrics.jsonl'}")  # fmt: skip


class _MlflowSender:
    """The MLflow client calls. One MLflow run per stage; a restarted stage continues its run."""

    def __init__(self, run: RunConfig, stage: str, folder: Path) -> None:
        self.run, self.stage, self.folder = run, stage, folder
        self.uri = store_uri(run)
        self._client: Any = None
        self._run_id = ""

    def open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        from mlflow import MlflowClient

        for chatter in ("mlflow.store.db.utils", "alembic"):  # they report the tables they create
            logging.getLogger(chatter).setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self.uri)
        note = self.folder / "mlflow_run_id"
        if note.exists():
            self._run_id = note.read_text().strip()
            return
        name = self.run.tracker.experiment
        found = self._client.get_experiment_by_name(name)
        place = (Path(self.run.out).resolve() / "mlartifacts").as_uri() if self.run.tracker.uri is None else None
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
        self._run_id = self._client.create_run(experiment, run_name=f"{self.run.name}/{self.stage}").info.run_id
        note.write_text(self._run_id)
        self._log_config()

    def _log_config(self) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:500]) for key, value in _flat("", public_config(self.run))]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def send(self, batch: list[tuple]) -> None:
        from mlflow.entities import Metric

        rows = [
            Metric(key, value, time_ms, step)
            for kind, *rest in batch
            if kind == "metrics"
            for step, time_ms, figures in [rest]
            for key, value in figures.items()
        ]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(self._run_id, metrics=rows[start : start + 1000])
        for kind, *rest in batch:
            if kind == "artifact":
                self._client.log_artifact(self._run_id, str(rest[0]))
            elif kind == "end":
                self._client.set_terminated(self._run_id, rest[0])


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(f"{prefix}.{key}" if prefix else key, inner)]
    return [(prefix, value)]
