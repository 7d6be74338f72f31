"""Several ranks on Ray: placed, watched, restarted together, and gone when their driver is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import on_ray

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def all_gone(folder: Path, count: int) -> bool:
    """Return whether all processes have ended whose ids the workers wrote into `folder`."""
    pids = [int(file.read_text()) for file in folder.glob("pid_*")]
    assert len(pids) == count
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


NOTE_PID = "(place / f'pid_{os.environ[\"RANK\"]}_{os.getpid()}').write_text(str(os.getpid()))\n"
FIRST_TIME = "first = not (place / 'tried').exists()\n"


def test_ranks_find_each_other(spec, view, cluster: str, tmp_path: Path) -> None:
    program = """
import socket
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "COLOUR"]
names += ["MASTER_ADDR", "MASTER_PORT"]
meeting = lambda: (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
(place / f"rank_{rank}").write_text(json.dumps({name: os.environ[name] for name in names}))
if rank == 0:
    with socket.create_server(meeting()) as server:
        print("rank 0 met", server.accept()[0].recv(9).decode())
else:
    for attempt in range(100):
        try:
            socket.create_connection(meeting()).sendall(b"rank 1")
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    print("not shown")
"""
    assert (
        on_ray.run(spec(program, workers=2, address=cluster, environment={"COLOUR": "red"}), view)
        == 0
    )
    first, second = (json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in range(2))
    assert [
        first.pop("RANK"),
        second.pop("RANK"),
        first.pop("LOCAL_RANK"),
        second.pop("LOCAL_RANK"),
    ] == ["0", "1", "0", "1"]
    assert first == second
    assert (first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"], first["COLOUR"]) == ("2", "2", "red")
    shown = view.out.getvalue()
    assert "rank 0 met rank 1" in shown
    assert "not shown" not in shown
    assert (tmp_path / "logs" / "attempt_0" / "rank_1.log").read_text() == "not shown\n"


def test_a_users_mistake_is_not_tried_again(spec, view, cluster: str, tmp_path: Path) -> None:
    program = NOTE_PID + "print('bad rank', rank); sys.exit(2 if rank else 1)"
    assert on_ray.run(spec(program, workers=2, address=cluster, max_restarts=3), view) == 2
    shown = view.out.getvalue()
    assert "rank 1 died: exit code 2" in shown
    assert "bad rank 1" in shown
    assert "restart" not in shown
    assert all_gone(tmp_path, 2)


def test_a_killed_worker_is_replaced_with_all_the_others(
    spec, view, cluster: str, tmp_path: Path
) -> None:
    program = (
        NOTE_PID
        + FIRST_TIME
        + """
if first and rank == 1:
    time.sleep(0.5)
    (place / 'tried').touch()
    os.kill(os.getpid(), signal.SIGKILL)
if first:
    progress(7, 9)
    time.sleep(60)
print("finished", rank)
"""
    )
    started = time.monotonic()
    assert on_ray.run(spec(program, workers=2, address=cluster, max_restarts=2), view) == 0
    assert time.monotonic() - started < 55, "rank 0 must not be waited for"
    shown = view.out.getvalue()
    assert "rank 1 died: killed by SIGKILL at step 7" in shown
    assert "restart 1 of 2" in shown
    assert "finished 0" in shown
    assert (tmp_path / "logs" / "attempt_1" / "rank_1.log").read_text() == "finished 1\n"
    assert all_gone(tmp_path, 4)


@pytest.mark.full
def test_a_lost_actor_takes_its_worker_along_and_is_replaced(
    spec, view, cluster: str, tmp_path: Path
) -> None:
    program = (
        NOTE_PID
        + FIRST_TIME
        + """
if first and rank == 1:
    (place / 'tried').touch()
    os.kill(os.getppid(), signal.SIGKILL)
if first:
    time.sleep(60)
"""
    )
    assert on_ray.run(spec(program, workers=2, address=cluster, max_restarts=1), view) == 0
    assert "rank 1 died: its node, or the process that kept it, was lost" in view.out.getvalue()
    assert all_gone(tmp_path, 4)


def test_too_few_cpus_are_reported_in_time(spec, view, cluster: str) -> None:
    started = time.monotonic()
    assert (
        on_ray.run(spec("", workers=2, cpus_per_worker=3, address=cluster, place_s=2.0), view) == 1
    )
    assert time.monotonic() - started < 20
    assert re.search(
        r"placing 2 workers: got \{'CPU': 4.0\} free within 2 s, expected \{'CPU': 6\}",
        view.out.getvalue(),
    )


@pytest.mark.full
def test_after_a_lost_node_the_run_goes_on_with_fewer_workers_and_grows_again(
    spec, view, cluster: str, nodes, tmp_path: Path
) -> None:
    """Two nodes, one worker on each by their size; the second one goes away and comes back. Growing
    lets the workers save."""
    second = nodes.add_node(num_cpus=4)
    program = """
world = int(os.environ["WORLD_SIZE"])
(place / f"world_{world}_{rank}").touch()
signal.signal(signal.SIGTERM, lambda *_: ((place / f"saved_{world}").touch(), sys.exit(75)))
if not (place / "saved_1").exists():
    time.sleep(300)
"""

    def until(*names: str) -> None:
        limit = time.monotonic() + 60
        while not all((tmp_path / name).exists() for name in names) and time.monotonic() < limit:
            time.sleep(0.1)

    def pull_the_plug_and_put_it_back() -> None:
        nonlocal second
        until("world_2_0", "world_2_1")
        nodes.remove_node(second)
        until("world_1_0")
        nodes._shutdown_at_exit = (
            False  # its hooks are signal handlers, which only the main thread may set
        )
        second = nodes.add_node(num_cpus=4)

    plug = threading.Thread(target=pull_the_plug_and_put_it_back)
    plug.start()
    asked = spec(
        program,
        workers=2,
        cpus_per_worker=3,
        address=cluster,
        max_restarts=2,
        place_s=10.0,
        fewer=(1,),
        grow_s=3.0,
    )
    started = time.monotonic()
    try:
        assert on_ray.run(asked, view) == 0, view.out.getvalue()
        assert time.monotonic() - started < 120
    finally:
        plug.join()
        nodes.remove_node(second)
    shown = view.out.getvalue()
    assert shown.count("2 workers on 2 nodes") == 2
    assert "its node, or the process that kept it, was lost" in shown
    assert "room for 1 of 2 workers" in shown
    assert "room for 2 workers: growing" in shown


@pytest.mark.full
@pytest.mark.parametrize(("together", "nodes_of"), [(1, [4, 2]), (3, [3, 3]), (6, [3, 3])])
def test_ranks_that_talk_most_share_a_node(
    spec, view, cluster: str, nodes, tmp_path: Path, together: int, nodes_of: list[int]
) -> None:
    """Two nodes of four CPUs. Six ranks that may lie anywhere fill one; groups of three stay whole;
    six that fit nowhere are halved."""
    second = nodes.add_node(num_cpus=4)
    program = (
        "(place / f'rank_{rank}').write_text(os.environ['LOCAL_WORLD_SIZE'] + ' ' +"
        " os.environ['LOCAL_RANK'])"
    )
    try:
        assert (
            on_ray.run(spec(program, workers=6, together=together, address=cluster), view) == 0
        ), view.out.getvalue()
    finally:
        nodes.remove_node(second)
    told = [(tmp_path / f"rank_{rank}").read_text() for rank in range(6)]
    first, other = nodes_of
    sides = [
        [f"{size} {local}" for size in order for local in range(size)]
        for order in ((first, other), (other, first))
    ]
    assert told in sides


def test_two_pools_restart_apart(spec, view, cluster: str, tmp_path: Path) -> None:
    """A killed worker of one pool costs the other nothing: it keeps its process, and both end."""
    program = (
        NOTE_PID
        + """
pool = os.environ["POOL"]
if pool == "low":
    first = not (place / "tried").exists()
    (place / "tried").touch()
    if first:
        while not (place / "high_is_up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    (place / "low_is_back").touch()
else:
    (place / "high_is_up").touch()
    while not (place / "low_is_back").exists():
        time.sleep(0.05)
progress(9, 9)
"""
    )
    common = {"address": cluster, "max_restarts": 1}
    pools = {
        pool: spec(program, environment={"POOL": pool}, logs=tmp_path / pool / "logs", **common)
        for pool in ("high", "low")
    }
    assert on_ray.run_pools(pools, view) == 0, view.out.getvalue()
    shown = view.out.getvalue()
    assert "low | rank 0 died: killed by SIGKILL" in shown
    assert "high | rank 0 died" not in shown
    assert all_gone(tmp_path, 3)


def test_sigterm_lets_the_workers_finish_their_work(
    spec, view, cluster: str, tmp_path: Path
) -> None:
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))\n"
        + NOTE_PID
        + "if rank == 0: os.kill(int(os.environ['DRIVER']), signal.SIGTERM)\ntime.sleep(60)"
    )
    asked = spec(
        program,
        workers=2,
        address=cluster,
        environment={"DRIVER": str(os.getpid())},
        max_restarts=2,
    )
    assert on_ray.run(asked, view) == 128 + signal.SIGTERM
    shown = view.out.getvalue()
    assert "saved" in shown
    assert "stopped by signal 15" in shown
    assert (tmp_path / "logs" / "attempt_0" / "rank_1.log").read_text() == "saved\n"
    assert all_gone(tmp_path, 2)


def test_no_worker_outlives_a_killed_driver(spec, cluster: str, tmp_path: Path) -> None:
    program = NOTE_PID + "time.sleep(300)"
    asked = spec(program, workers=2, address=cluster)
    (tmp_path / "driver.py").write_text(
        "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import on_ray\nfrom"
        " launch.progress import ProgressView\nfrom launch.spec import"
        f" LaunchSpec\non_ray.run({asked!r}, ProgressView())\n"
    )
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    until = time.monotonic() + 40
    while len(list(tmp_path.glob("pid_*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert all_gone(tmp_path, 2)
