"""Signs of life: always a whole sentence, and only the silent are named."""

import json
import os
import threading
import time

import pytest

from wm_train.checkpoint import writer
from wm_train.checkpoint.saver import Saver
from wm_train.config.schema import TrainerConfig
from wm_train.resilience import heartbeat
from wm_train.resilience.heartbeat import Heartbeat, silent_ranks
from wm_train.world import World


def test_whoever_reads_finds_a_whole_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.0)
    with Heartbeat(tmp_path, 0) as pulse:
        path = tmp_path / "rank_00000.json"
        while not path.stat().st_size:
            time.sleep(0.001)
        for step in range(3000):
            pulse.at(step, "train" if step % 2 else "record, validate, save")
            assert json.loads(path.read_text())["section"] in (
                "start",
                "train",
                "record, validate, save",
            )


def test_only_the_silent_and_the_absent_are_named(tmp_path):
    for rank, age in ((0, 0.0), (1, 30.0), (3, 2.0)):
        path = tmp_path / f"rank_{rank:05d}.json"
        path.write_text(json.dumps({"step": 12, "section": "train"}))
        os.utime(path, (time.time() - age, time.time() - age))
    lines = silent_ranks(tmp_path, 4)
    assert lines == [
        "rank 2 never started its work",
        "rank 1 has been silent for 30 s, last seen in step 12, section train",
    ]
    assert silent_ranks(tmp_path / "nowhere", 4) == []
    assert len(silent_ranks(tmp_path, 4, after_s=60.0)) == 1


def test_a_save_that_waits_for_a_lost_process_ends_and_names_it(tmp_path, monkeypatch):
    """The thread hangs in a collective that has half an hour; the run must not."""
    never = threading.Event()
    monkeypatch.setattr(writer, "commit", lambda *_: never.wait(60))
    saver = Saver(
        tmp_path,
        "short",
        TrainerConfig(),
        World(0, 1),
        print,
        lambda: ["rank 1 has been silent for 9 s"],
    )
    saver.save(1, {}, {})
    with pytest.raises(RuntimeError, match="waiting for a save: rank 1 has been silent"):
        saver.wait()
    never.set()


def test_a_save_that_breaks_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "commit", lambda *_: 1 / 0)
    saver = Saver(tmp_path, "short", TrainerConfig(), World(0, 1), print)
    saver.save(1, {}, {})
    with pytest.raises(ZeroDivisionError):
        saver.wait()
