"""Send a stage's JSONL record to MLflow, continuing from what the store already has.

So a store that was down is complete in the end. `mlflow.json` in the stage's folder notes the
store, the run and the last step sent. Sending always continues from there, so a dead server, a
killed trainer and `replay` are one case. Repeated steps are sent again: the last result counts.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wm_train.config.schema import TrackerConfig
from wm_train.config.typed import without_login
from wm_train.tracking.goodput import read_life
from wm_train.tracking.rows import parse_row

NOTE = "mlflow.json"
METRICS, ARTIFACTS = "metrics.jsonl", "artifacts.jsonl"
EVERY_S = 2.0  # time between sendings, so that many steps share one call
RETRY_S, RETRY_LIMIT_S = 5.0, 60.0  # between attempts at a store that does not answer; doubles
MOST = 1000  # metrics in one call: MLflow's limit
NOT_METRICS = ("step", "time")
PARENT_METRICS = ("loss", "validation_loss")  # of a pool, also recorded in the run of all pools


@dataclass(frozen=True)
class Sent:
    """Store how much of a record a store has received."""

    uri: str
    run_id: str
    step: int = 0
    artifacts: int = 0
    status: str = "RUNNING"


@dataclass(frozen=True)
class Subject:
    """Identify the stage that a record is about, or with stage "" the run of all pools.

    config: the whole run's configuration without logins.
    """

    run: str
    pool: str | None
    stage: str
    tracker: TrackerConfig
    out: Path
    config: Mapping[str, Any]

    def parameters(self) -> dict[str, Any]:
        """Return the configuration without the recipe's other stages."""
        recipe = self.config["recipe"]
        stages = {k: v for k, v in recipe["stages"].items() if self.stage in ("", k)}
        return {**self.config, "recipe": {**recipe, "stages": stages}}

    @property
    def uri(self) -> str:
        """Return where MLflow keeps this run: `tracker.uri`, or a SQLite file in the output
        folder."""
        return self.tracker.uri or f"sqlite:///{self.out.resolve() / 'mlflow.db'}"


class MlflowRecord:
    """Send one stage's folder to MLflow. Not thread-safe."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder, self.uri = subject, folder, subject.uri
        self.shown_uri = without_login(subject.uri)
        self._client: Any = None
        self._sent: Sent | None = None
        self._offset = 0  # bytes of the metrics file that are sent
        self._back_to: int | None = None

    @property
    def run_id(self) -> str:
        """Return the run's id in the store, once it has been reached."""
        assert self._sent is not None
        return self._sent.run_id

    def rewind(self, step: int) -> None:
        """Send the record after `step` again; may be called from any thread."""
        self._back_to = step

    def catch_up(self, status: str | None = None) -> int:
        """Send what the store lacks; return the number of steps sent.

        The run's end is sent if `status` gives one. Raises whatever the store's client raises; what
        was sent until then is remembered.
        """
        if self._client is None:
            self._open()
        assert self._sent is not None
        if self._back_to is not None:
            back, self._back_to, self._offset = self._back_to, None, 0
            self._keep(replace(self._sent, step=min(self._sent.step, back), status="RUNNING"))
        steps = self._send_metrics()
        self._send_artifacts()
        if status is not None and status != self._sent.status:
            life = read_life(self.folder)
            if life is not None and life.ended and life.goodput is not None:
                self._client.log_metric(
                    self._sent.run_id,
                    "goodput",
                    life.goodput,
                    int(life.ended * 1000),
                    self._sent.step,
                )
            self._client.set_terminated(self._sent.run_id, status)
            self._keep(replace(self._sent, status=status))
        return steps

    def forget(self) -> None:
        """Drop the connection; the next `catch_up` makes a new one."""
        self._client = None

    def missing(self) -> int:
        """Return the number of recorded steps that the store does not have."""
        have = self._sent.step if self._sent else (note.step if (note := self._read_note()) else 0)
        return sum(
            row["step"] > have
            for line in _whole_lines(self.folder / METRICS, 0)[0]
            if (row := parse_row(line))
        )

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # we try again ourselves
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        from mlflow import MlflowClient

        for chatter in (
            "mlflow.store.db.utils",
            "alembic",
        ):  # they log every table that they create
            logging.getLogger(chatter).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self.uri)
        self._sent, self._offset = self._read_note() or self._create(client), 0
        self._keep(self._sent)
        self._client = client

    def _create(self, client: Any) -> Sent:
        from mlflow.entities import Param

        name = self.subject.tracker.experiment
        found = client.get_experiment_by_name(name)
        place = (
            (self.subject.out.resolve() / "mlartifacts").as_uri()
            if self.subject.tracker.uri is None
            else None
        )
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(name, artifact_location=place)
        )
        name = "/".join(
            part for part in (self.subject.run, self.subject.pool, self.subject.stage) if part
        )
        tags = (
            {"mlflow.parentRunId": self.subject.tracker.parent}
            if self.subject.tracker.parent
            else {}
        )
        run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [
            Param(key, str(value)[:500]) for key, value in _flat("", self.subject.parameters())
        ]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            client.log_batch(run_id, params=params[start : start + 100])
        return Sent(self.shown_uri, run_id)

    def _send_metrics(self) -> int:
        from mlflow.entities import Metric

        assert self._sent is not None
        steps = 0
        while True:
            lines, end = _whole_lines(self.folder / METRICS, self._offset, most=100)
            read = [row for line in lines if (row := parse_row(line))]
            rows = [row for row in read if row["step"] > self._sent.step]
            metrics = [
                Metric(key, float(value), int(row.get("time", 0) * 1000), row["step"])
                for row in rows
                for key, value in row.items()
                if key not in NOT_METRICS
            ]
            for start in range(0, len(metrics), MOST):
                self._client.log_batch(self._sent.run_id, metrics=metrics[start : start + MOST])
            if (parent := self.subject.tracker.parent) and rows:
                name = f"{self.subject.pool}/{self.subject.stage}/"
                losses = [
                    Metric(name + m.key, m.value, m.timestamp, m.step)
                    for m in metrics
                    if m.key in PARENT_METRICS
                ]
                # at most two of each of a hundred rows
                self._client.log_batch(parent, metrics=losses)
            if rows:
                self._keep(replace(self._sent, step=rows[-1]["step"]))
            self._offset, steps = end, steps + len(rows)
            if not lines:
                return steps

    def _send_artifacts(self) -> None:
        assert self._sent is not None
        for line in _whole_lines(self.folder / ARTIFACTS, 0)[0][self._sent.artifacts :]:
            path = self.folder / json.loads(line)["path"]
            if path.is_file():  # samples of repeated steps may have been removed
                self._client.log_artifact(self._sent.run_id, str(path))
            self._keep(replace(self._sent, artifacts=self._sent.artifacts + 1))

    def _read_note(self) -> Sent | None:
        try:
            note = Sent(**json.loads((self.folder / NOTE).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return note if note.uri == self.shown_uri else None

    def _keep(self, sent: Sent) -> None:
        self._sent = sent
        draft = self.folder / f"{NOTE}.tmp-{os.getpid()}"
        draft.write_text(json.dumps(asdict(sent)) + "\n")
        draft.replace(self.folder / NOTE)


class Forwarder:
    """Call `catch_up` every EVERY_S in a thread, and again after a failure.

    Only `close` waits for it.
    """

    def __init__(self, record: MlflowRecord, report: Callable[[str], None]) -> None:
        self.record, self.report = record, report
        self._ended = threading.Event()
        self._status = "FAILED"
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, timeout_s: float) -> None:
        """Send the rest and the end, or report the number of missing steps after `timeout_s`."""
        self._status = status
        self._ended.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say_missing("did not answer in time")

    def _say_missing(self, why: str) -> None:
        self.report(
            f"MLflow at {self.record.shown_uri} {why}: {self.record.missing()} steps are in"
            f" {self.record.folder / METRICS} only."
            f" Fix: python -m wm_train.tracking replay {self.record.folder}"
        )

    def _run(self) -> None:
        pause, failed = EVERY_S, ""
        while True:
            ended = self._ended.wait(pause)
            try:
                steps = self.record.catch_up(self._status if ended else None)
                if failed:
                    self.report(
                        f"MLflow at {self.record.shown_uri} answers again; {steps} steps were sent"
                    )
                pause, failed = EVERY_S, ""
            # any failure of a tracking store, of whatever library, must not stop training
            except Exception as error:
                self.record.forget()
                pause = min(2 * pause, RETRY_LIMIT_S) if failed else RETRY_S
                if not failed and not ended:
                    self.report(
                        f"MLflow at {self.record.shown_uri} failed, the run goes on without it"
                        f" ({_first_line(error)}). Every figure is in"
                        f" {self.record.folder / METRICS} and is sent when the store answers"
                    )
                failed = _first_line(error)
            if ended:
                if failed:
                    self._say_missing(f"failed ({failed})")
                return


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def _whole_lines(path: Path, offset: int, most: int | None = None) -> tuple[list[bytes], int]:
    """Return at most `most` complete lines from `offset` on, and the offset after them."""
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while (most is None or len(lines) < most) and (line := file.readline()).endswith(b"\n"):
                lines.append(line)
    except FileNotFoundError:
        pass
    return lines, offset + sum(map(len, lines))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in _flat(f"{prefix}.{key}" if prefix else key, inner)
        ]
    return [(prefix, value)]
