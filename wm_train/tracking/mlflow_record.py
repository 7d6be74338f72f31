"""Send a stage's JSONL record to MLflow, continuing from what the store already has.

So a store that was down is complete in the end. `mlflow.json` in the stage's folder notes the
store, the run and the last step sent. Sending always continues from there, so a dead server, a
killed trainer and `replay` are one case. Repeated steps are sent again: the last result counts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.storage.files import open_regular
from wm_train.config.schema import TrackerConfig
from wm_train.redact import clean_text, clean_value, environment_secrets, logins_in
from wm_train.storage import read_regular
from wm_train.tracking.answer import check_answer
from wm_train.tracking.goodput import read_life
from wm_train.tracking.rows import parse_row

NOTE = "mlflow.json"
METRICS, ARTIFACTS = "metrics.jsonl", "artifacts.jsonl"
EVALUATIONS = "evaluations.jsonl"
MOST = 1000  # metrics in one call: MLflow's limit
NOT_METRICS = ("step", "time")
PARENT_METRICS = ("loss", "validation_loss")  # of a pool, also recorded in the run of all pools
PLAIN_KEY = re.compile(r"[\w.-]+")  # a part of a parameter's name; MLflow refuses most other signs
UNKNOWN_RUN = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Sent:
    """Store how much of a record a store has received. described: the run has its parameters."""

    uri: str
    run_id: str
    step: int = 0
    artifacts: int = 0
    evaluations: int = 0
    status: str = "RUNNING"
    described: bool = True


@dataclass(frozen=True)
class Subject:
    """Identify the stage that a record is about, or with stage "" the run of all pools.

    config: the whole run's configuration without secrets.
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


class DeletedError(ValueError):
    """Report an experiment that somebody has deleted in the store, so that no run can be made in
    it."""


class MlflowRecord:
    """Send one stage's folder to MLflow. Not thread-safe.

    report: told when the run that the folder notes is gone and a new one takes its place.
    """

    def __init__(self, subject: Subject, folder: Path, report: Callable[[str], None]) -> None:
        self.subject, self.folder, self.uri, self.report = subject, folder, subject.uri, report
        self.shown_uri: str = clean_value(subject.uri)
        self._client: Any = None
        self._sent: Sent | None = None
        self._parent: str | None = None
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
        self._send_evaluations()
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
        lines, _ = _whole_lines(self.folder / METRICS, 0)
        return sum(row["step"] > have for row in _rows(lines))

    def first_line(self, error: Exception) -> str:
        """Return the first line of an error, without the store's password in any form."""
        known = [*logins_in(self.uri), *environment_secrets()]
        text = (clean_text(str(error), known).strip() or "-").splitlines()[0]
        return f"{type(error).__name__}: {text[:400]}"

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
        check_answer(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        note, self._offset = self._read_note(), 0
        if note is not None and (gone := _gone(client, note.run_id)):
            self.report(
                f"MLflow at {self.shown_uri}: run {note.run_id} {gone}; a new run gets the whole"
                f" record of {self.folder}"
            )
            note = None
        self._keep(note or self._create(client))
        self._describe(client)
        self._parent = self.subject.tracker.parent
        if self._parent and (gone := _gone(client, self._parent)):
            self.report(f"MLflow at {self.shown_uri}: the run of all pools, {self._parent}, {gone}")
            self._parent = None
        self._client = client

    def _create(self, client: Any) -> Sent:
        name = self.subject.tracker.experiment
        found = client.get_experiment_by_name(name)
        if found and found.lifecycle_stage != "active":
            raise DeletedError(
                f"experiment {name!r} has been deleted there, expected one that takes runs. Fix:"
                f" mlflow experiments restore --experiment-id {found.experiment_id}, or"
                f" tracker.experiment=<another> (replay --experiment <another>)"
            )
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
        return Sent(self.shown_uri, run_id, described=False)

    def _describe(self, client: Any) -> None:
        """Send the parameters, unless the run has them. The run is noted before, so that an
        attempt that fails here is followed by one with the same run."""
        from mlflow.entities import Param

        assert self._sent is not None
        if self._sent.described:
            return
        params = [
            Param(key, str(value)[:500]) for key, value in _flat("", self.subject.parameters())
        ]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            client.log_batch(self._sent.run_id, params=params[start : start + 100])
        self._keep(replace(self._sent, described=True))

    def _send_metrics(self) -> int:
        from mlflow.entities import Metric

        assert self._sent is not None
        steps = 0
        while True:
            lines, end = _whole_lines(self.folder / METRICS, self._offset, most=100)
            rows = [row for row in _rows(lines) if row["step"] > self._sent.step]
            metrics = [
                Metric(key, number, _milliseconds(row.get("time")), row["step"])
                for row in rows
                for key, value in row.items()
                if key not in NOT_METRICS and (number := _number(value)) is not None
            ]
            for start in range(0, len(metrics), MOST):
                self._client.log_batch(self._sent.run_id, metrics=metrics[start : start + MOST])
            if (parent := self._parent) and rows:
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

    def _send_evaluations(self) -> None:
        """Send evaluations one by one; those of repeated steps are there twice, the last counts."""
        from mlflow.entities import Metric, RunTag

        assert self._sent is not None
        for line in _whole_lines(self.folder / EVALUATIONS, 0)[0][self._sent.evaluations :]:
            found = json.loads(line)
            row = found["row"]
            metrics = [
                Metric(key, number, _milliseconds(row.get("time")), row["step"])
                for key, value in row.items()
                if key not in NOT_METRICS and (number := _number(value)) is not None
            ]
            tags = [RunTag(key, value) for key, value in found["tags"].items()]
            for start in range(0, len(metrics), MOST):
                part = metrics[start : start + MOST]
                self._client.log_batch(self._sent.run_id, metrics=part, tags=tags)
            self._keep(replace(self._sent, evaluations=self._sent.evaluations + 1))

    def _send_artifacts(self) -> None:
        assert self._sent is not None
        for line in _whole_lines(self.folder / ARTIFACTS, 0)[0][self._sent.artifacts :]:
            path = self.folder / json.loads(line)["path"]
            if path.is_file():  # samples of repeated steps may have been removed
                self._client.log_artifact(self._sent.run_id, str(path))
            self._keep(replace(self._sent, artifacts=self._sent.artifacts + 1))

    def _read_note(self) -> Sent | None:
        try:
            note = Sent(**json.loads(read_regular(self.folder / NOTE)))
        except (OSError, ValueError, TypeError, RecursionError):  # damaged: a new run gets all
            return None
        kinds = {"step": int, "artifacts": int, "evaluations": int, "described": bool}
        whole = all(type(value) is kinds.get(key, str) for key, value in vars(note).items())
        return note if whole and note.uri == self.shown_uri else None

    def _keep(self, sent: Sent) -> None:
        self._sent = sent
        draft = self.folder / f"{NOTE}.tmp-{os.getpid()}"
        draft.write_text(json.dumps(asdict(sent)) + "\n")
        draft.replace(self.folder / NOTE)


def _whole_lines(path: Path, offset: int, most: int | None = None) -> tuple[list[bytes], int]:
    """Return at most `most` complete lines from `offset` on, and the offset after them."""
    lines: list[bytes] = []
    try:
        with open_regular(path) as file:
            file.seek(offset)
            while (most is None or len(lines) < most) and (line := file.readline()).endswith(b"\n"):
                lines.append(line)
    except FileNotFoundError:
        pass
    return lines, offset + sum(map(len, lines))


def _rows(lines: list[bytes]) -> list[dict[str, Any]]:
    """Return the steps in lines of the record. A damaged line is left out: the trainer reports it
    when it opens the record."""
    return [row for line in lines if (row := parse_row(line))]


def _milliseconds(seconds: Any) -> int:
    """Return a time as MLflow takes it, 0 for one that is not known."""
    known = _number(seconds)
    return int(known * 1000) if known is not None and math.isfinite(known) else 0


def _number(value: Any) -> float | None:
    """Return a figure as MLflow takes it, "NaN" and "Infinity" too; None for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _gone(client: Any, run_id: str) -> str:
    """Return how a run was lost, "" if it takes figures."""
    from mlflow.exceptions import MlflowException

    try:
        stage = client.get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code != UNKNOWN_RUN:
            raise
        return "is not there any more"
    return "" if stage == "active" else "has been deleted there"


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """Return the values of nested mappings by their full key. A mapping with keys that are no plain
    names, such as the addresses of a mixture, counts as one value."""
    if isinstance(value, dict) and all(PLAIN_KEY.fullmatch(key) for key in value):
        return [
            row
            for key, inner in value.items()
            for row in _flat(f"{prefix}.{key}" if prefix else key, inner)
        ]
    return [(prefix, value)]
