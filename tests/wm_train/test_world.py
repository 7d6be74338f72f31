"""The rendezvous of a run on one machine: nobody else's network sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.inline import free_port
from launch.spec import GLOO, on_this_machine, rank_environment
from wm_train.resilience.preemption import Preempted, StopRequest
from wm_train.world import meeting_place

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "0100007F"  # as /proc/net/tcp writes it
MEET = """
from test_world import listening
from wm_train.backends import get_backend
from wm_train.resilience.preemption import Preempted, StopRequest
from wm_train.world import join_world, leave_world
world = join_world(get_backend("cpu"), 60.0)
assert world.gather(world.rank) == [0, 1]
print("listens", *listening())
world.barrier()
leave_world()
"""


def listening() -> list[str]:
    """Return the addresses at which this process listens, as /proc writes them."""
    own, found = set(), []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(file))
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            local, state, inode = [line.split()[place] for place in (1, 3, 9)]
            if state == "0A" and f"socket:[{inode}]" in own:
                found.append(local.split(":")[0])
    return found


def start(program: str, count: int) -> list[subprocess.Popen]:
    """Start the first `count` of two ranks."""
    port = free_port("127.0.0.1")
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONPATH": path,
                **rank_environment(rank, 2, rank, 2, "127.0.0.1", port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def test_the_store_of_one_machine_is_served_on_its_loopback_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, port = listening(), free_port("127.0.0.1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with ThreadPoolExecutor(2) as both:
        calls = [both.submit(meeting_place, rank, 2, 60.0) for rank in range(2)]
        first, second = (call.result(timeout=90) for call in calls)
    second.set("key", "value")
    assert first.get("key") == b"value"
    assert sorted(listening()) == sorted([*before, LOOPBACK])


@pytest.mark.full
def test_ranks_of_one_machine_listen_on_its_loopback_only() -> None:
    said = [rank.communicate(timeout=120)[0] for rank in start(MEET, 2)]
    found = [word for text in said for word in text.partition("listens ")[2].split()]
    assert len(found) >= 3, f"the store, and gloo of each rank: {said}"
    assert set(found) == {LOOPBACK}, said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_whose_peer_does_not_come_hears_a_request_to_stop(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port("127.0.0.1")))
    stop = StopRequest()
    signal.signal(signal.SIGTERM, stop._raise)
    killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    killer.start()
    try:
        with pytest.raises(Preempted):
            meeting_place(rank, 2, 60.0)
        with pytest.raises(TimeoutError, match=r"1 of 2 workers|no answer of rank 0"):
            meeting_place(rank, 2, 0.1)
    finally:
        killer.join()
        signal.signal(signal.SIGTERM, before)


def test_a_choice_of_ones_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert socket.if_nametoindex(on_this_machine()[GLOO])
    monkeypatch.setenv(GLOO, "eth7")
    assert GLOO not in rank_environment(0, 2, 0, 2, "127.0.0.1", 1)
    monkeypatch.delenv(GLOO)
    assert GLOO not in rank_environment(0, 2, 0, 2, "10.0.0.5", 1)
