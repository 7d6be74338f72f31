"""The record of a run: each step once, also after a restart; MLflow gets the same; a store that
fails costs nothing."""

import json
import os
import threading
import time

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.typed import public_config, to_json
from wm_train.tracking import forwarder, goodput, mlflow_record
from wm_train.tracking import tracker as tracking
from wm_train.tracking.tracker import StepLog, Tracker, main, read_steps, send_file


def make_run(folder, *overrides):
    return compose(
        [
            "experiment=demo",
            "recipe=demo",
            "data.path=/data",
            f"out={folder}",
            "stage=short",
            *overrides,
        ]
    )


def test_steps_that_are_done_again_are_dropped_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = StepLog(path, 0)
    for step in range(1, 8):
        first.write({"step": step, "loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    again = StepLog(path, 5)
    again.write({"step": 6, "loss": 60.0})
    again.close()
    assert [(row["step"], row["loss"]) for row in read_steps(path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5),
        (6, 60),
    ]


def test_mlflow_has_every_step_and_one_run_across_a_restart(tmp_path):
    from mlflow import MlflowClient

    said: list[str] = []
    stage = tmp_path / "short"
    stage.mkdir()
    for first, last in ((0, 3), (3, 5)):
        tracker = Tracker(plan_stage(make_run(tmp_path), "short"), stage, first, said.append)
        for step in range(first + 1, last + 1):
            tracker.step(step, {"loss": 1.0 / step})
        picture = stage / "sheet.png"
        picture.write_bytes(b"png")
        tracker.artifact(picture)
        tracker.close("KILLED" if last == 3 else "FINISHED")
    assert [line.split()[0] for line in said] == ["goodput", "goodput"]
    send_file(make_run(tmp_path), stage, tmp_path / "report.html")  # there is none yet
    (tmp_path / "report.html").write_text("<p>a page</p>")
    send_file(make_run(tmp_path), stage, tmp_path / "report.html")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("wm_train").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 1.0 / step) for step in range(1, 6)]
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.stages.short.frames"] == "41"
    kept = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert sorted(kept) == ["report.html", "sheet.png"]


def test_what_a_store_missed_is_replayed(tmp_path, capsys):
    """Down for a whole run: said once, with the command that makes up for it. The command, and the
    next start, send what is missing."""
    from mlflow import MlflowClient

    blocked = tmp_path / "store"
    blocked.write_text("not a folder")
    said: list[str] = []
    run = make_run(tmp_path, f"tracker.uri=sqlite:///{blocked / 'mlflow.db'}")
    (tmp_path / "config.json").write_text(to_json(run))
    tracker = Tracker(plan_stage(run, "short"), tmp_path, 0, said.append)
    for step in range(1, 251):
        tracker.step(step, {"loss": 1.0 / step, "step_s": 0.01})
    tracker.close()
    (missing,) = [line for line in said if "only. Fix:" in line]
    assert "250 steps are in" in missing
    assert f"replay {tmp_path}" in missing
    assert [row["step"] for row in read_steps(tmp_path / "metrics.jsonl")] == list(range(1, 251))
    assert main(["replay", str(tmp_path)]) == 1, "still down"
    blocked.unlink()
    blocked.mkdir()
    assert main(["replay", str(tmp_path)]) == 0
    client = MlflowClient(f"sqlite:///{blocked / 'mlflow.db'}")
    (stored,) = client.search_runs([client.get_experiment_by_name("wm_train").experiment_id])
    history = {m.step: m.value for m in client.get_metric_history(stored.info.run_id, "loss")}
    assert history == {step: 1.0 / step for step in range(1, 251)}
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["goodput"] > 0
    assert "250 steps sent" in capsys.readouterr().out
    assert main(["replay", str(tmp_path)]) == 0
    assert ": 0 steps sent" in capsys.readouterr().out


def test_no_step_waits_for_a_store_that_hangs(tmp_path, monkeypatch):
    """A server that takes the call and never answers: the thread is stuck in its first call, and
    every step is recorded meanwhile."""
    calls, answer = [], threading.Event()
    monkeypatch.setattr(forwarder, "EVERY_S", 0.01)

    def hang(self, status=None):
        calls.append(status)
        answer.wait(30)
        raise ConnectionError("no answer")

    monkeypatch.setattr(mlflow_record.MlflowRecord, "catch_up", hang)
    said: list[str] = []
    tracker = Tracker(plan_stage(make_run(tmp_path), "short"), tmp_path, 0, said.append)
    while not calls:
        time.sleep(0.01)
    threads = threading.active_count()
    for step in range(1, 2001):
        tracker.step(step, {"loss": 1.0})
    assert calls == [None], "2,000 steps passed during one call"
    assert threading.active_count() == threads
    assert len(read_steps(tmp_path / "metrics.jsonl")) == 2000
    tracker.close(timeout_s=0.1)
    assert any("did not answer in time" in line for line in said)
    answer.set()


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, monkeypatch):
    said: list[str] = []
    tracker = Tracker(
        plan_stage(make_run(tmp_path, "tracker=none"), "short"), tmp_path, 0, said.append
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        for step in (1, 2):
            tracker.step(step, {"loss": 1.0})
    assert [line for line in said if "No space left" in line and "Fix: make room" in line] == said[
        :1
    ]
    tracker.step(3, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_goodput_is_over_the_whole_life(tmp_path, monkeypatch):
    """Three starts in 100 s, 30 of them in steps that count; a day later an extension, of which
    only its own 20 s are added."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(goodput, "process_started", lambda: clock["now"])
    monkeypatch.setattr(tracking.time, "time", lambda: clock["now"])
    run, said = make_run(tmp_path, "tracker=none"), []

    def attempt(first: int, last: int, ends: float, status: str, workers: int = 2) -> None:
        tracker = Tracker(plan_stage(run, "short"), tmp_path, first, said.append, workers)
        for step in range(first + 1, last + 1):
            tracker.step(step, {"step_s": 1.0, "skipped": float(step == 30)})
        clock["now"] = ends
        tracker.close(status)

    attempt(0, 15, 1030.0, "FAILED")
    attempt(10, 20, 1060.0, "KILLED", workers=1)  # five steps are done again and count once
    attempt(20, 31, 1100.0, "FINISHED")  # one of them is skipped
    assert said[-1] == "goodput 30.0%: 30.0 s of steps in 100.0 s (3 starts, 5 steps done again)"
    clock["now"] += 86400
    attempt(31, 31, clock["now"] + 5, "FINISHED")  # nothing to do
    assert len(said) == 3
    clock["now"] -= 5
    attempt(31, 41, clock["now"] + 20, "FINISHED")
    assert "40.0 s of steps in 120.0 s" in said[-1]
    # the line of each start: when, after which step, on how many workers, steps done again
    starts = [tuple(row.values()) for row in goodput.read_starts(tmp_path)]
    assert starts[:3] == [(0, 1000.0, 2, 0), (10, 1030.0, 1, 5), (20, 1060.0, 2, 0)]
    assert [step for step, *_ in starts[3:]] == [31, 31]


@pytest.mark.parametrize(
    "address", ["http://zoe9:secret@host:5000/x", "postgresql://zoe9:secret@db/mlflow"]
)
def test_logins_never_reach_what_is_stored(tmp_path, address):
    stored = json.dumps(public_config(make_run(tmp_path, f"'tracker.uri={address}'".strip("'"))))
    assert "secret" not in stored
    assert "zoe9" not in stored
    assert address.split("@")[1] in stored
