"""The place that checkpoints go to has one owner, in a folder and in a store."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wm_train.errors import StorageError
from wm_train.resilience import store_lock
from wm_train.resilience.one_run import only_run, owned_place
from wm_train.resilience.run_lock import NAME, OwnedError, owned, read_owner, this_process
from wm_train.resilience.store_lock import owned_in_store, read_stored
from wm_train.storage import place
from wm_train.world import World

ROOT = Path(__file__).resolve().parents[3]
ALONE = World(0, 1)


@pytest.fixture
def store(request, monkeypatch):
    monkeypatch.setattr(store_lock, "SETTLE_S", 0.05)
    monkeypatch.setattr(store_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(store_lock, "STALE_S", 0.6)
    folder = place(f"memory://locks/{request.node.name.replace('[', '-').strip(']')}")
    yield folder
    if folder.is_dir():
        folder.remove()


def write(folder, **changes):
    there = dataclasses.replace(this_process(), host="node7", **changes)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(there)))
    return there


def test_a_second_run_is_refused_and_a_dead_one_succeeded(store):
    with owned_in_store(store), pytest.raises(OwnedError, match=rf"owned by process {os.getpid()}"):
        owned_in_store(store).__enter__()
    assert read_stored(store) is None
    write(store, born="1")  # a process of this machine that has ended
    with owned_in_store(store) as mine:
        assert read_stored(store).token == mine.token
    write(store, machine="another")  # silent
    with owned_in_store(store) as mine:
        assert read_stored(store).token == mine.token


def test_an_owner_elsewhere_lives_by_its_beat(store):
    there, ended = write(store, machine="another"), threading.Event()
    thread = threading.Thread(target=store_lock._beat, args=(store, there, ended))
    thread.start()
    with pytest.raises(OwnedError, match="on node7"):
        owned_in_store(store).__enter__()
    ended.set()
    thread.join()


def test_of_two_that_start_at_once_one_goes_on(store, monkeypatch):
    """The other one writes its name after ours, before we look again."""
    true = store_lock.time.sleep
    monkeypatch.setattr(
        store_lock.time, "sleep", lambda s: (write(store, machine="another"), true(s))
    )
    with pytest.raises(OwnedError, match="on node7"):
        owned_in_store(store).__enter__()
    assert read_stored(store).host == "node7", "it took nothing back"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_half_a_sentence_is_no_owner_for_ever(store, text):
    with (store / NAME).open("w") as file:
        file.write(text)
    with owned_in_store(store) as mine:
        assert read_stored(store).token == mine.token


WAKE = """
import dataclasses, json, sys, time
from wm_train.resilience import store_lock
from wm_train.resilience.run_lock import NAME
from wm_train.storage import place
store_lock.BEAT_S = store_lock.SETTLE_S = 0.05
folder = place("memory://woken")
with store_lock.owned_in_store(folder) as mine:
    other = dataclasses.replace(mine, token="other", host="node7")
    with (folder / NAME).open("w") as file:
        file.write(json.dumps(dataclasses.asdict(other)))
    time.sleep(30)
"""


def test_an_owner_that_was_succeeded_leaves():
    done = subprocess.run(
        [sys.executable, "-c", WAKE], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "belongs to process" in done.stderr
    assert "node7" in done.stderr


def test_two_runs_with_one_local_place_are_one_and_a_refusal(tmp_path):
    place_of_both = tmp_path / "kept" / "demo" / "short"
    with (
        only_run(tmp_path / "a", ALONE, place_of_both),
        pytest.raises(OwnedError, match=str(place_of_both)),
        only_run(tmp_path / "b", ALONE, place_of_both),
    ):
        pass
    assert not (tmp_path / "b" / NAME).exists()
    with only_run(tmp_path / "b", ALONE, place_of_both):
        assert read_owner(place_of_both).pid == os.getpid()


def test_the_usual_place_is_held_with_the_folder(tmp_path):
    with only_run(tmp_path, ALONE, tmp_path / "checkpoints"):
        assert not (tmp_path / "checkpoints").exists()
        with pytest.raises(OwnedError), owned_place(tmp_path / "checkpoints"):
            pass


def test_a_store_that_does_not_answer_is_told_from_one_that_is_taken(tmp_path, store, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no route to the store")

    monkeypatch.setattr(type(store.fs), "cat_file", refuse)
    with pytest.raises(StorageError, match="no route") as caught, only_run(tmp_path, ALONE, store):
        pass
    assert caught.value.passing
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("deep", [False, True], ids=["a claim", "a claim on a claim"])
@pytest.mark.parametrize("text", ["named", ""], ids=["named", "empty"])
def test_a_claim_that_is_left_is_succeeded(tmp_path, monkeypatch, text, deep):
    """Killed within the take-over of a dead run; an older version left the file empty."""
    from wm_train.resilience import run_lock

    monkeypatch.setattr(run_lock, "STALE_S", 0.3)
    dead = dataclasses.replace(this_process(), born="1", token="dead")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    said = json.dumps(dataclasses.asdict(dead)) if text else ""
    claim = tmp_path / f"{NAME}.claim-dead"
    claim.write_text(said)
    if deep:
        inner = "dead" if text else "unfinished"
        (tmp_path / f"{claim.name}.claim-{inner}").write_text(said)
    with owned(tmp_path) as mine:
        assert read_owner(tmp_path).token == mine.token
    assert not list(tmp_path.iterdir())


def test_a_claim_of_a_living_process_is_respected(tmp_path):
    dead = dataclasses.replace(this_process(), born="1", token="dead")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(dead)))
    claim = tmp_path / f"{NAME}.claim-dead"
    claim.write_text(json.dumps(dataclasses.asdict(this_process())))
    with pytest.raises(OwnedError, match="owned by process"), owned(tmp_path):
        pass
    assert claim.exists()


def test_a_full_disk_leaves_no_half_lock(tmp_path, monkeypatch):
    """Half a lock counts as an unknown owner, and keeps the next start waiting."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"), owned(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
