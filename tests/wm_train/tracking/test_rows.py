"""Keep every good line of a record: damaged ones are left out and said, strict readers take the
rest."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.tracking import goodput, tracker
from wm_train.tracking.goodput import Life
from wm_train.tracking.mlflow_record import MlflowRecord
from wm_train.tracking.rows import parse_row, read_rows, to_line
from wm_train.tracking.tracker import StepLog, Tracker, read_steps, subject_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = f"out={tmp_path_factory.mktemp('runs')}"
    line = ["experiment=demo", "recipe=demo", "data.path=/data", out, "stage=short"]
    return compose([*line, "tracker=none"])


def refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


DAMAGED = {
    "half": b'{"step": 3, "lo',
    "no UTF-8": b'{"step": 3, "loss": "\xff\xfe"}',
    "zeros": b"\0" * 200,
    "no object": b"[3]",
    "a number": b"3",
    "null": b"null",
    "no step": b'{"loss": 1.0}',
    "a text for a step": b'{"step": "3"}',
    "a text for a figure": b'{"step": 3, "step_s": "long"}',
    "a list for a figure": b'{"step": 3, "loss": [1]}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_costs_that_line_and_is_said(run, tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    lines = [to_line({"step": step, "loss": 1.0 / step}).encode() for step in range(1, 7)]
    lines[2] = DAMAGED[kind] + b"\n"
    path.write_bytes(b"".join(lines))
    before, said = path.read_bytes(), []
    record = Tracker(plan_stage(run, "short"), tmp_path, 5, said.append)
    record.step(6, {"loss": 6.0})
    record.close()
    assert [row["step"] for row in read_steps(path)] == [1, 2, 4, 5, 6]
    assert "1 damaged lines (the first is line 3)" in said[0]
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == before
    assert str(aside) in said[0]


def test_mlflow_gets_what_is_whole_of_a_damaged_record(run, tmp_path):
    lines = [to_line({"step": 1}).encode(), b"\xff\n", to_line({"step": 2}).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    record = MlflowRecord(subject_of(run, "short"), tmp_path, print)
    assert record.missing() == 2


def test_a_record_of_steps_that_no_checkpoint_has_is_kept_aside(tmp_path):
    """As when the checkpoints were lost, or went to a place that is another now."""
    path = tmp_path / "metrics.jsonl"
    first = StepLog(path, 0)
    for step in (1, 2, 3):
        first.write({"step": step})
    first.close()
    again = StepLog(path, 0)
    again.close()
    (aside,) = tmp_path.glob("metrics.jsonl.before-*")
    assert [row["step"] for row in read_steps(aside)] == [1, 2, 3]
    assert str(aside) in again.news
    assert read_steps(path) == []


def test_a_record_is_strict_json_and_comes_back(run, tmp_path):
    figures = {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "whole": 3}
    record = Tracker(plan_stage(run, "short"), tmp_path, 0, print)
    record.step(1, figures)
    record.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=refuse)
    assert strict["loss"] is None
    assert strict["grad_norm"] == "Infinity"
    (row,) = read_steps(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["low"], row["whole"]) == (math.inf, -math.inf, 3)


def test_lines_of_an_older_version_are_read(tmp_path):
    (tmp_path / "old").write_text('{"step": 1, "loss": NaN, "grad_norm": Infinity}\n')
    rows, damaged = read_rows(tmp_path / "old")
    assert not damaged
    assert math.isnan(rows[0]["loss"])
    json.loads(to_line(rows[0]), parse_constant=refuse)
    assert parse_row(b"") is None


def test_goodput_after_a_clock_that_went_back_is_left_out(run, tmp_path, monkeypatch):
    """It was 30 s of steps in 0.0 s: three thousand million per cent."""
    clock, said = {"now": 10_000.0}, []
    monkeypatch.setattr(goodput, "process_started", lambda: clock["now"])
    monkeypatch.setattr(tracker.time, "time", lambda: clock["now"])
    record = Tracker(plan_stage(run, "short"), tmp_path, 0, said.append)
    for step in range(1, 31):
        record.step(step, {"step_s": 1.0})
    clock["now"] -= 3600
    record.close()
    assert "goodput unknown, as the clock was set back: 30.0 s of steps (1 start)" in said
    life = goodput.read_life(tmp_path)
    assert life is not None
    assert life.goodput is None


def test_goodput_of_less_time_than_the_steps_took_is_left_out():
    """The clock went back by a part of the run."""
    life = Life(1000.0, 1, ended=1020.0, productive_s=60.0)
    assert life.goodput is None
    assert replace(life, ended=1100.0).goodput == pytest.approx(0.6)
