"""The record of a run: each step once, also after a restart; MLflow gets the same; a store that fails costs nothing."""

import json

import pytest

from wm_train.compose import compose
from wm_train.tracking import StepLog, Tracker, public_config, read_steps


def make_run(folder, *overrides):
    return compose(["experiment=demo", "data.path=/data", f"out={folder}", "stage=short", *overrides])


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
    assert [(row["step"], row["loss"]) for row in read_steps(path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60)]


def test_mlflow_has_every_step_and_one_run_across_a_restart(tmp_path):
    from mlflow import MlflowClient

    said: list[str] = []
    for first, last in ((0, 3), (3, 5)):
        tracker = Tracker(make_run(tmp_path), "short", tmp_path, first, said.append)
        for step in range(first + 1, last + 1):
            tracker.step(step, {"loss": 1.0 / step})
        picture = tmp_path / "sheet.png"
        picture.write_bytes(b"png")
        tracker.artifact(picture)
        tracker.close("KILLED" if last == 3 else "FINISHED")
    assert not said
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("wm_train").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 1.0 / step) for step in range(1, 6)]
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.stages.short.frames"] == "41"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["sheet.png"]


def test_a_store_that_fails_is_said_once_and_the_file_has_everything(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said: list[str] = []
    run = make_run(tmp_path, f"tracker.uri=sqlite:///{blocked / 'mlflow.db'}")
    tracker = Tracker(run, "short", tmp_path, 0, said.append)
    for step in range(1, 4):
        tracker.step(step, {"loss": 1.0})
    tracker.close()
    assert len(said) == 1
    assert "the run goes on without it" in said[0]
    assert [row["step"] for row in read_steps(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("address", ["http://zoe9:secret@host:5000/x", "postgresql://zoe9:secret@db/mlflow"])
def test_logins_never_reach_what_is_stored(tmp_path, address):
    stored = json.dumps(public_config(make_run(tmp_path, f"'tracker.uri={address}'".strip("'"))))
    assert "secret" not in stored
    assert "zoe9" not in stored
    assert address.split("@")[1] in stored
