"""MLflow's store as the field treats it: runs and experiments deleted in the browser, a lost
database, passwords in its address, answers that never end."""

import json
import shlex
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.typed import to_json
from wm_train.tracking import answer
from wm_train.tracking.mlflow_record import METRICS, NOTE, MlflowRecord
from wm_train.tracking.tracker import Tracker, main, subject_of, where_to_look

SECRET = "hunter2"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A database with MLflow's tables: making them takes a second, copying it does not."""
    from mlflow import MlflowClient

    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def stage(tmp_path, empty_store):
    """The folder of stage short, with an empty store where the run's is."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "short").mkdir()
    return tmp_path / "short"


@cache
def composed(overrides):
    names = ["experiment=demo", "recipe=demo", "data.path=/data", "stage=short"]
    return compose([*names, *overrides])


def make_run(folder, *overrides):
    return replace(composed(overrides), out=str(folder))


def record_steps(folder, first, last, said, *overrides):
    run = make_run(folder.parent, *overrides)
    tracker = Tracker(plan_stage(run, "short"), folder, first, said.append)
    for step in range(first + 1, last + 1):
        tracker.step(step, {"loss": 1.0 / step})
    tracker.close(timeout_s=600.0)  # waits only as long as it must


def client_of(folder):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")


def active_run(client, name="wm_train"):
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return run


def steps_of(client, run):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]


@pytest.mark.parametrize("lost", ["run deleted", "run purged", "database lost"])
def test_a_lost_run_is_named_and_made_anew_with_the_whole_record(stage, empty_store, lost, capsys):
    said: list[str] = []
    record_steps(stage, 0, 2, said)
    client, database = client_of(stage), stage.parent / "mlflow.db"
    old = active_run(client).info.run_id
    if lost == "database lost":
        database.write_bytes(empty_store.read_bytes())  # in place: the client keeps it open
    elif lost == "run deleted":
        client.delete_run(old)
    else:
        import sqlite3

        client.delete_run(old)
        with sqlite3.connect(database) as purge:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                purge.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (old,))
    (stage / "config.json").write_text(to_json(make_run(stage.parent)))
    assert main(["replay", str(stage)]) == 0
    told = capsys.readouterr().out
    assert f"run {old}" in told
    assert "2 steps sent" in told
    record_steps(stage, 2, 4, said)
    run = active_run(client_of(stage))
    assert run.info.run_id != old
    assert steps_of(client_of(stage), run) == [1, 2, 3, 4]
    assert run.data.params["recipe.stages.short.frames"] == "41"
    assert not [line for line in said if "failed" in line]


def test_a_run_deleted_in_mid_run_goes_on_in_a_new_one(stage):
    said: list[str] = []
    subject = subject_of(make_run(stage.parent), "short")
    record = MlflowRecord(subject, stage, said.append)
    (stage / METRICS).write_text('{"step": 1, "time": 1.0, "loss": 1.0}\n')
    assert record.catch_up() == 1
    client_of(stage).delete_run(record.run_id)
    with (stage / METRICS).open("a") as file:
        file.write('{"step": 2, "time": 2.0, "loss": 0.5}\n')
    with pytest.raises(Exception, match="active"):
        record.catch_up()
    record.forget()
    assert record.catch_up() == 2
    assert steps_of(client_of(stage), active_run(client_of(stage))) == [1, 2]
    assert "has been deleted" in said[0]


def test_a_deleted_experiment_is_named_with_two_ways_out(stage, capsys):
    said: list[str] = []
    record_steps(stage, 0, 2, said)
    client = client_of(stage)
    number = client.get_experiment_by_name("wm_train").experiment_id
    client.delete_experiment(number)
    (stage / "config.json").write_text(to_json(make_run(stage.parent)))
    assert main(["replay", str(stage)]) == 1
    told = capsys.readouterr().err
    assert "'wm_train'" in told
    assert f"restore --experiment-id {number}" in told
    assert main(["replay", str(stage), "--experiment", "second"]) == 0
    assert steps_of(client, active_run(client, "second")) == [1, 2]
    record_steps(stage, 2, 3, said, "tracker.experiment=second")
    assert steps_of(client, active_run(client, "second")) == [1, 2, 3]


def test_a_deleted_run_of_all_pools_does_not_stop_a_pools_record(stage):
    client = client_of(stage)
    whole = client.create_run(client.create_experiment("other")).info.run_id
    client.delete_run(whole)
    said: list[str] = []
    record_steps(stage, 0, 2, said, f"tracker.parent={whole}")
    assert steps_of(client, active_run(client)) == [1, 2]
    assert any(whole in line for line in said)


def test_what_mlflow_would_refuse_as_a_name_is_one_value(stage):
    """Sets of a mixture are addresses; a refused parameter made a new run at every attempt."""
    run = make_run(stage.parent)
    short = run.recipe.stages["short"]
    sets = {"s3://k:hunter2@b/x": 1.0, "/data/a+b": 2.0}
    short = replace(short, data=replace(short.data, mixture=sets))
    run = replace(run, recipe=replace(run.recipe, stages={"short": short}))
    record = MlflowRecord(subject_of(run, "short"), stage, print)
    record.catch_up("FINISHED")
    params = active_run(client_of(stage)).data.params
    assert params["recipe.stages.short.data.mixture"] == "{'s3://b/x': 1.0, '/data/a+b': 2.0}"


def test_an_attempt_that_fails_half_way_leaves_one_run(stage, monkeypatch):
    from mlflow import MlflowClient

    record = MlflowRecord(subject_of(make_run(stage.parent), "short"), stage, print)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                record.catch_up()
            record.forget()
    record.catch_up()
    assert active_run(client_of(stage)).data.params["seed"] == "0"


def test_figures_that_are_no_numbers_and_damaged_lines_stop_nothing(stage):
    rows = [
        '{"step": 1, "time": null, "loss": null}',
        '{"step": 2, "time": 2.0, "loss": NaN, "lr": 0.1}',
        "{half a li",
        "[]",
        '{"step": "3"}',
        '{"step": 4, "time": 4.0, "loss": 0.5}',
    ]
    (stage / METRICS).write_text("\n".join(rows) + "\n")
    record = MlflowRecord(subject_of(make_run(stage.parent), "short"), stage, print)
    assert record.catch_up() == 3
    assert steps_of(client_of(stage), active_run(client_of(stage))) == [1, 2, 4]


@pytest.mark.parametrize("change", [{"step": "7"}, {"artifacts": None}, {"run_id": 3}, {"x": 1}])
def test_a_damaged_note_is_no_note(stage, change):
    record_steps(stage, 0, 2, [])
    note = json.loads((stage / NOTE).read_text())
    (stage / NOTE).write_text(json.dumps(note | change))
    record = MlflowRecord(subject_of(make_run(stage.parent), "short"), stage, print)
    assert record.missing() == 2


@pytest.mark.parametrize(
    "address",
    [f"http://robot:{SECRET}@127.0.0.1:9", f"ftp://robot:{SECRET}@h", f"http://u:{SECRET}@[::1/x"],
)
def test_no_password_in_what_the_tracker_says(stage, address, capsys):
    run = make_run(stage.parent, f"tracker.uri='{address}'")
    (stage / "config.json").write_text(to_json(run))
    said: list[str] = []
    record_steps(stage, 0, 1, said, f"tracker.uri='{address}'")
    assert main(["replay", str(stage)]) == 1
    out = capsys.readouterr()
    everything = "\n".join([*said, out.out, out.err])
    assert any("Fix: python -m wm_train.tracking replay" in line for line in said)
    assert SECRET not in everything
    assert "robot" not in everything


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "mlflow ui --host 127.0.0.1 --backend-store-uri 'sqlite:///{out}/mlflow.db'"),
        (["tracker.uri='http://me:hunter2@host:5000'"], "http://host:5000  (open it"),
        (["tracker.uri=databricks"], "databricks"),
        (["tracker.uri='postgresql://u:hunter2@db/m'"], "-store-uri postgresql://db/m"),
    ],
)
def test_the_closing_line_can_be_pasted(tmp_path, overrides, expected):
    out = tmp_path / "my runs"
    line = where_to_look(make_run(out, *overrides))
    assert expected.format(out=out) in line
    assert SECRET not in line
    if "mlflow ui" in line:
        assert len(shlex.split(line.split("; ")[1].rstrip(")"))) == 6
    else:
        assert "backend-store-uri" not in line


@contextmanager
def server(handle):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            handle(self)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        thread = threading.Thread(target=here.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{here.server_port}"
        here.shutdown()
        thread.join()


def test_an_answer_without_an_end_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "MOST_BYTES", 1 << 16)

    def pour(request):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"x" * (1 << 16))
        except OSError:
            pass  # the reader has gone

    with server(pour) as address:
        run = make_run(tmp_path, f"tracker.uri={address}")
        record = MlflowRecord(subject_of(run, "short"), tmp_path, print)
        with pytest.raises(ValueError, match=r"more than .* bytes .* Fix: tracker.uri"):
            record.catch_up()


def test_a_server_without_health_is_left_to_the_client():
    def refuse(request):
        request.send_error(404)

    with server(refuse) as address:
        answer.check_answer(address)
    answer.check_answer("http://127.0.0.1:9")
    answer.check_answer("sqlite:////nowhere")
