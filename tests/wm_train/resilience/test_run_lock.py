"""Lock a run's folder: a second run is refused, a dead one is succeeded, and one taken for dead
ends itself."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.spec import fill
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.launch import run_groups, spec_of
from wm_train.resilience import hold, run_lock
from wm_train.resilience.one_run import only_run
from wm_train.resilience.run_lock import (
    COMMAND,
    NAME,
    OwnedError,
    check_free,
    owned,
    parse_owner,
    read_owner,
    this_process,
)
from wm_train.world import World

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from wm_train.resilience.run_lock import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def rival(tmp_path):
    """A process that owns tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(folder: Path, **changes) -> run_lock.Owner:
    """Write an owner of another machine."""
    there = dataclasses.replace(this_process(), machine="another", host="node7", **changes)
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(there)))
    return there


def test_a_second_run_is_refused_and_told_whose_it_is_and_a_killed_one_is_succeeded_at_once(
    tmp_path, rival
):
    for taking in (lambda: check_free(tmp_path), lambda: owned(tmp_path).__enter__()):
        with pytest.raises(
            OwnedError, match=rf"owned by process {rival.pid} on \S+, expected none.*Fix:"
        ):
            taking()
    rival.send_signal(signal.SIGSTOP)  # stopped is not dead: it may wake up
    with pytest.raises(OwnedError):
        check_free(tmp_path)
    rival.kill()
    began = time.monotonic()
    while run_lock.born_at(rival.pid):
        time.sleep(0.01)  # it is a zombie until we wait for it, and that is dead enough
    with owned(tmp_path) as mine:
        assert read_owner(tmp_path).pid == mine.pid == os.getpid()
    assert time.monotonic() - began < run_lock.STALE_S / 2
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_is_another(tmp_path):
    dead = dataclasses.replace(this_process(), born="1")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    with owned(tmp_path) as mine:
        assert read_owner(tmp_path).token == mine.token


def test_an_owner_on_another_machine_lives_by_its_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 1.0)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.1)
    there = elsewhere(tmp_path)
    ended = threading.Event()
    file = os.open(tmp_path / NAME, os.O_WRONLY)
    thread = threading.Thread(target=run_lock._beat, args=(tmp_path, there, file, ended))
    thread.start()
    with pytest.raises(OwnedError, match="on node7"), owned(tmp_path):
        pass
    ended.set()
    thread.join()
    os.close(file)
    with owned(tmp_path) as mine:  # silent now
        assert read_owner(tmp_path).token == mine.token


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_half_a_sentence_is_no_owner_for_ever(tmp_path, monkeypatch, text):
    monkeypatch.setattr(run_lock, "STALE_S", 0.3)
    (tmp_path / NAME).write_text(text)
    with owned(tmp_path) as mine:
        assert read_owner(tmp_path).token == mine.token


def test_of_many_successors_one_wins(tmp_path):
    dead = dataclasses.replace(this_process(), born="1", token="dead")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    start, outcomes, leave = threading.Barrier(16), [], threading.Event()

    def rush():
        start.wait()
        try:
            with owned(tmp_path):
                outcomes.append("owner")
                leave.wait(10)
        except OwnedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=rush) for _ in range(16)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(outcomes) < 16 and time.monotonic() < until:
        time.sleep(0.01)
    leave.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["owner"] + ["refused"] * 15


def test_a_successor_that_comes_late_does_not_push_out_the_first_one(tmp_path, monkeypatch):
    """Both have found the same owner dead; the first has taken over when the second goes on."""
    dead = dataclasses.replace(this_process(), born="1", token="dead")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    first = owned(tmp_path)
    true = run_lock.lives

    def late(*arguments):
        monkeypatch.setattr(run_lock, "lives", true)
        first.__enter__()
        return False

    monkeypatch.setattr(run_lock, "lives", late)
    with pytest.raises(OwnedError), owned(tmp_path):
        pass
    assert read_owner(tmp_path).pid == os.getpid()
    first.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_an_owner_that_was_thought_dead_leaves_when_it_wakes(tmp_path, rival):
    assert rival.stderr is not None
    there = elsewhere(tmp_path)
    assert rival.wait(timeout=10) == run_lock.LOST
    assert f"belongs to process {there.pid} on node7 now" in rival.stderr.read()
    assert read_owner(tmp_path) == there, "it took nothing back"


def test_every_process_of_the_run_is_refused(tmp_path, rival):
    with pytest.raises(OwnedError, match=str(rival.pid)), only_run(tmp_path, World(0, 1)):
        pass


def test_the_command_is_refused_before_it_touches_the_folder(tmp_path, capsys):
    config = compose(
        ["experiment=demo", "recipe=demo", "stage=short", "data.path=/data", f"out={tmp_path}"]
    )
    stages = plan_stages(config)
    folder = stages[0].directory
    with owned(folder):
        assert run_groups([{"": spec_of(config, stages[0], stages)}], "inline") == 2
    assert f"owned by process {os.getpid()}" in capsys.readouterr().err
    assert not list(folder.iterdir()), "the config of the run that lives is not written over"


@pytest.mark.parametrize("host", ["here\x1b[2J", 5, "a\n@progress {}"])
def test_a_holder_that_could_not_be_named_is_unknown(host):
    """The refusal shows it on a terminal."""
    text = json.dumps({**dataclasses.asdict(this_process()), "host": host})
    assert parse_owner(text).host == "unknown"


def test_a_job_in_a_queue_holds_its_folder_as_a_command_does(tmp_path, data):
    plain = ["experiment=demo", "recipe=demo", "stage=1", f"data.path={data}", f"out={tmp_path}"]
    config = compose([*plain, "launcher=slurm", "launcher.slurm.runner=ray"])
    stages = plan_stages(config)
    spec = spec_of(config, stages[0], stages)
    folder = spec.config_path.parent
    process = subprocess.Popen(
        fill(spec.holder, ""), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OwnedError, match=f"owned by process {process.pid}"):
        check_free(folder, COMMAND)
    process.terminate()
    assert process.wait(10) == 0
    check_free(folder, COMMAND)
    local = compose(plain)
    stages = plan_stages(local)
    assert spec_of(local, stages[0], stages).holder == (), "the command itself is there"


def test_a_holder_that_another_run_keeps_out_says_so(tmp_path, rival, monkeypatch, capsys):
    monkeypatch.setattr(hold, "WAIT_S", 0.6)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert hold.main([str(tmp_path)]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert f"owned by process {rival.pid}" in told.err
    assert "held" not in told.out
