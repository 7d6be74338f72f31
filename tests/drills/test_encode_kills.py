"""`encode` with two workers, killed with SIGKILL at random moments and started again: the bytes of
an undisturbed run, no orphans."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data_shards import encode, record

KILLS = 8


def bytes_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def processes_of_group(group):
    listed = subprocess.run(
        ["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return [
        line.split()[1]
        for line in listed
        if line.split()[:1] == [str(group)] and not line.split()[2].startswith("Z")
    ]


def wait_until_gone(group):
    """A process that is ending closes its files before it leaves the list of processes."""
    deadline = time.monotonic() + 20
    while processes_of_group(group):
        assert time.monotonic() < deadline, "workers outlived the command"
        time.sleep(0.1)


@pytest.mark.drill
@pytest.mark.parametrize("container", ["tar", "zarr"])
@pytest.mark.parametrize("whole_group", [True, False])
def test_random_kills(tmp_path, container, whole_group):
    """`whole_group`: the workers die too, as on a machine that is switched off; else only the
    command, and they must follow it."""
    recording = tmp_path / "rec"
    assert record.main(["vizdoom", f"out={recording}", "clips=24", "frames=41", "seed=5"]) == 0
    arguments = [
        f"source={recording}",
        "shard_mb=0.05",
        f"container={container}",
        "workers=2",
        "image_latents_every=16",
    ]
    started = time.monotonic()
    assert encode.main([*arguments, f"out={tmp_path / 'undisturbed'}"]) == 0
    seconds = time.monotonic() - started
    moments, killed, expected = random.Random(container), 0, bytes_of(tmp_path / "undisturbed")
    command = [sys.executable, "-m", "data_shards.encode", *arguments, f"out={tmp_path / 'set'}"]
    while killed < KILLS:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            assert child.wait(timeout=moments.uniform(0.1, 0.9) * seconds) == 0
            assert bytes_of(tmp_path / "set") == expected
            shutil.rmtree(tmp_path / "set")  # it got through: from the start again
        except subprocess.TimeoutExpired:
            killed += 1
            (os.killpg if whole_group else os.kill)(child.pid, signal.SIGKILL)
            child.wait()
        wait_until_gone(child.pid)
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    assert bytes_of(tmp_path / "set") == expected
    what = "the whole group" if whole_group else "the command alone"
    print(f"{container}, {what} killed: {killed} kills, {len(expected)} files the same")


@pytest.mark.drill
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals(tmp_path, name, workers):
    """Sent to the command alone, in the middle of a shard: it ends at once with the documented code
    and one line, nothing lives on, and the next run gives the bytes of an undisturbed one."""
    recording, scratch = tmp_path / "rec", tmp_path / "scratch"
    scratch.mkdir()
    assert record.main(["vizdoom", f"out={recording}", "clips=24", "frames=41", "seed=5"]) == 0
    arguments = [f"source={recording}", "shard_mb=0.05", f"workers={workers}"]
    assert encode.main([*arguments, f"out={tmp_path / 'undisturbed'}"]) == 0
    command = [sys.executable, "-m", "data_shards.encode", *arguments, f"out={tmp_path / 'set'}"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    rows = tmp_path / "set.partial" / "rows"
    deadline = time.monotonic() + 120
    while not (rows.is_dir() and list(rows.iterdir())):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(getattr(signal, name))
    _, words = child.communicate(timeout=60)
    assert child.returncode == 128 + getattr(signal, name), words
    assert words.decode().splitlines()[-1].endswith(f"interrupted ({name})")
    assert b"Traceback" not in words
    wait_until_gone(child.pid)
    assert not list(scratch.iterdir())
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "undisturbed")
