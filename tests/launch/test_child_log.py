"""A log file that cannot be written costs its lines, not the run: the worker never waits for it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from launch import child as module
from launch.child import Child, LogFile
from launch.spec import rank_environment

MANY = 4_000  # lines of 100 bytes: several times what a pipe holds


def everything(child: Child) -> tuple[list[str], int]:
    seen, code = [], None
    while code is None:
        lines, code = child.wait(20.0, for_lines=True)
        seen += lines
    return seen, code


@pytest.mark.parametrize("where", ["full device", "folder that cannot be made", "a folder"])
def test_a_worker_goes_on_when_its_log_cannot_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").symlink_to("/dev/full")
    log = {
        "full device": tmp_path / "full",
        "folder that cannot be made": tmp_path / "file" / "logs" / "rank_0.log",
        "a folder": tmp_path / "folder",
    }[where]
    program = f"for i in range({MANY}): print('x' * 99)\nprint('the end')"
    child = Child([sys.executable, "-c", program], {}, tmp_path, log)
    try:
        seen, code = everything(child)
    finally:
        child.stop(0.0)
    assert code == 0
    assert seen[-1] == "the end"
    told = [line for line in seen if str(log) in line]
    assert len(told) == 1, "said once"
    assert "cannot be written" in told[0]


def test_lines_are_written_again_when_there_is_room(tmp_path: Path, monkeypatch) -> None:
    """A full disk that takes half a line, then nothing, then all."""
    log, real, full = LogFile(tmp_path / "log"), os.write, {"room": 10**9}

    def write(file: int, data: bytes) -> int:
        if not full["room"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: full["room"]]
        full["room"] -= len(part)
        return real(file, part)

    monkeypatch.setattr(module.os, "write", write)
    assert log.write("first") == ""
    full["room"] = 3
    assert "No space left" in log.write("second")
    assert log.write("third") == "", "said once"
    full["room"] = 10**9
    assert "again" in log.write("fourth")
    log.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        "first",
        "sec",
        "(2 lines are missing here: they could not be written)",
        "fourth",
    ]


@pytest.mark.usefixtures("nodes")  # they come first: Ray reads the way of its login only once
def test_a_copy_of_the_config_goes_with_its_worker(
    spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that does not share the run's folder gets one, with the tracker's password in it."""
    from launch.rank_actor import RankActor

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    asked = replace(spec("open(sys.argv[1]).read()"), config_path=tmp_path / "elsewhere")
    actor = RankActor()
    actor.start(asked, {"RANK": "0"}, str(tmp_path / "log"))
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    while actor.listen(5.0, False).code is None:
        pass
    assert not list((tmp_path / "scratch").iterdir())
    assert actor.stop(0.0) == 0


def test_an_agent_of_another_launcher_is_forgotten() -> None:
    """A shell inside a torchrun hands its variables on, and no agent serves our rendezvous."""
    assert rank_environment(0, 2, 0, 2, "h", 1)["TORCHELASTIC_USE_AGENT_STORE"] == "False"
