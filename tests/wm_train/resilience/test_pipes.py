"""Pipes under the names of files in a run's folder: whoever opens them plainly waits for ever for
somebody at the other end."""

import os
import threading
from pathlib import Path

import pytest

from data_shards.storage.remote import RangeCache
from launch.child import LogFile
from launch.token import TokenError, ensure_token
from wm_train import launch as command
from wm_train.checkpoint.tensor_file import read_digest
from wm_train.config.yaml_files import yaml_problems
from wm_train.resilience.heartbeat import silent_ranks
from wm_train.resilience.run_lock import COMMAND, NAME, check_free, read_owner
from wm_train.storage import check_regular, read_regular
from wm_train.tracking.goodput import read_life
from wm_train.tracking.rows import read_rows
from wm_train.worker import read_config


def ends(call, *arguments):
    """Call in a thread; return its result or the exception. A call that waits at a pipe is let go,
    and fails the test."""
    found = []

    def work():
        try:
            found.append(call(*arguments))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    waits = thread.is_alive()
    for path in arguments:
        for pipe in [path, *path.rglob("*")] if waits and isinstance(path, Path) else ():
            if pipe.is_fifo():
                end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
                thread.join(1)
                os.close(end)
    assert not waits, f"{call.__name__} waits for the pipe"
    return found[0]


def pipe(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", [NAME, COMMAND])
def test_a_lock_is_read_and_refused(tmp_path, name):
    pipe(tmp_path, name)
    found = ends(lambda folder: read_owner(folder, name), tmp_path)
    assert isinstance(found, OSError)
    assert "a pipe, expected a regular file" in str(found)
    assert name in str(found)
    assert isinstance(ends(check_free, tmp_path), OSError)


@pytest.mark.parametrize("read", [read_regular, read_rows, read_digest, read_config])
def test_records_checkpoints_and_configs_are_read_and_refused(tmp_path, read):
    path = pipe(tmp_path, "file")
    arguments = (path, None) if read is read_config else (path,)
    found = ends(read, *arguments)
    assert isinstance(found, OSError)
    assert str(path) in str(found)


def test_what_only_informs_is_left_out(tmp_path):
    pipe(tmp_path, "life.json")
    assert ends(read_life, tmp_path) is None
    pipe(tmp_path / "heartbeats", "rank_00000.json")
    assert ends(lambda folder: silent_ranks(folder, 1), tmp_path / "heartbeats") == []


@pytest.mark.parametrize(
    "name", ["owner.json", "metrics.jsonl", "logs/rank_00000.log", "checkpoints/latest"]
)
def test_a_command_starts_nothing_in_such_a_folder(data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(command, "WORKER", ("{python}", "-S", "-c", "print('ran')", "{config}"))
    stage = tmp_path / "runs" / "a" / "short"
    path = pipe(stage, name)
    arguments = ["experiment=demo", "recipe=demo", "launcher=inline", f"data.path={data}"]
    arguments += [f"out={tmp_path / 'runs'}", "name=a", "stage=1"]
    assert ends(lambda folder: command.main(arguments), tmp_path) == 2
    told = capsys.readouterr()
    assert f"it is a pipe, expected a regular file: '{path}'" in told.err
    assert "ran" not in told.out


def test_links_and_folders_are_none_of_these(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "place").symlink_to("logs")
    check_regular(tmp_path)
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"it is a device.*device'"):
        check_regular(tmp_path)


def test_a_log_loses_its_lines_and_nothing_waits(tmp_path):
    path = pipe(tmp_path, "rank_00000.log")
    log = ends(LogFile, path)
    assert "cannot be written" in ends(lambda _: log.write("a line"), path)


def test_a_token_and_a_users_configuration_are_refused(tmp_path):
    path = pipe(tmp_path, "auth_token")
    assert isinstance(ends(ensure_token, path), TokenError)
    pipe(tmp_path / "configs", "mine.yaml")
    (problem,) = ends(lambda folder: list(yaml_problems(folder)), tmp_path / "configs")
    assert "mine.yaml, a pipe or a device" in str(problem)


def test_a_range_in_the_cache_is_fetched_again(tmp_path):
    cache = RangeCache(tmp_path, 10**6)
    cache.get("x", 3, lambda: b"abc")
    (file,) = cache.folder.iterdir()
    file.unlink()
    os.mkfifo(file)
    assert ends(lambda _: cache.get("x", 3, lambda: b"abc"), tmp_path) == b"abc"
