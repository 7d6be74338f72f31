"""Ranks under torchrun: the same environment, exit codes and restarts as under the other
launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import on_torchrun
from launch.inline import free_port

ROOT = Path(__file__).resolve().parents[2]


def test_environment_and_a_killed_rank_is_replaced_with_the_other(
    spec, view, tmp_path: Path
) -> None:
    program = """
first = not (place / 'tried').exists()
if first and rank == 1:
    (place / 'tried').touch()
    os.kill(os.getpid(), signal.SIGKILL)
if first:
    time.sleep(60)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "COLOUR")
values = [os.environ[name] for name in names] + [bool(os.environ["MASTER_PORT"])]
(place / f"rank_{rank}").write_text(json.dumps(values))
if rank == 0:
    progress(1, 1)
"""
    assert (
        on_torchrun.run(
            spec(program, workers=2, environment={"COLOUR": "red"}, max_restarts=1), view
        )
        == 0
    )
    assert [json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in range(2)] == [
        [str(rank), "2", str(rank), "2", "red", True] for rank in range(2)
    ]
    shown = view.out.getvalue()
    assert "rank 1 died: killed by SIGKILL" in shown
    assert "step 1/1" in shown


def test_a_users_mistake_is_not_tried_again(spec, view) -> None:
    assert (
        on_torchrun.run(
            spec("print('bad data', rank); sys.exit(2)", workers=2, max_restarts=3), view
        )
        == 2
    )
    shown = view.out.getvalue()
    assert "bad data" in shown
    assert "restart" not in shown.replace("max_restarts", "")


def failure(rank: int, code: int, at: float = 0.0) -> dict[str, float]:
    return {"rank": rank, "code": code, "time": at}


@pytest.mark.parametrize(
    ("first", "other", "rank"),
    [(1, 2, 1), (1, 74, 1), (1, -9, 1), (1, 1, 0), (-6, 2, 1), (2, 1, 0), (74, 2, 1)],
)
def test_of_ranks_that_fail_within_one_look_the_telling_one_counts(
    first: int, other: int, rank: int
) -> None:
    """A peer of a rank that has left fails a moment later, and torchrun may see both at once."""
    death = on_torchrun.reported([failure(0, first), failure(1, other)])
    assert (death.rank, death.code) == (rank, (first, other)[rank])


@pytest.mark.parametrize(("late", "other"), [(30.0, -9), (0.0, -15)])
def test_a_rank_that_torchrun_itself_took_down_explains_nothing(late: float, other: int) -> None:
    death = on_torchrun.reported([failure(0, 1), failure(1, other, late)])
    assert (death.rank, death.code) == (0, 1)


REPORT = """
============================================================
worker FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : 2 (pid: 12)
  error_file: <N/A>
============================================================
"""


@pytest.mark.full
def test_a_library_decides_over_no_restart(spec, view, tmp_path: Path) -> None:
    """It prints what torchrun reports of a user's mistake, and the agent is killed before it can
    report anything."""
    program = f"""
if rank == 0:
    print({REPORT!r})
    print('@failures [{{"rank": 1, "code": 2, "time": 0}}]', flush=True)
    time.sleep(1)
    agent = os.getppid()
    os.kill(agent, signal.SIGKILL)
time.sleep(30)
"""
    assert on_torchrun.run(spec(program, workers=2, max_restarts=1, backoff_s=0.1), view) == 137
    assert "restart 1 of 1" in view.out.getvalue()


def test_sigterm_lets_the_workers_finish_their_work(spec, view, tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: ((place / f"saved_{rank}").touch(), sys.exit(75)))
(place / f"up_{rank}").touch()
if rank == 0:
    while len(list(place.glob("up_*"))) < 2:
        time.sleep(0.05)
    os.kill(int(os.environ["DRIVER"]), signal.SIGTERM)
time.sleep(60)
"""
    asked = spec(
        program, workers=2, environment={"DRIVER": str(os.getpid())}, max_restarts=2, grace_s=20.0
    )
    assert on_torchrun.run(asked, view) == 128 + signal.SIGTERM
    assert {file.name for file in tmp_path.glob("saved_*")} == {"saved_0", "saved_1"}


@pytest.mark.full
def test_two_machines_meet_at_an_endpoint(spec, view, tmp_path: Path) -> None:
    """The same command started twice, as on two machines; the second one in a process of its
    own."""
    program = (
        "(place / f'rank_{rank}').write_text(os.environ['WORLD_SIZE'] + ' ' +"
        " os.environ['LOCAL_WORLD_SIZE'])"
    )
    asked = spec(program, workers=4, nodes=2, endpoint=f"127.0.0.1:{free_port('127.0.0.1')}")
    (tmp_path / "other.py").write_text(
        "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import on_torchrun\nfrom"
        " launch.progress import ProgressView\nfrom launch.spec import"
        f" LaunchSpec\nsys.exit(on_torchrun.run({asked!r}, ProgressView()))\n"
    )
    other = subprocess.Popen(
        [sys.executable, str(tmp_path / "other.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    watchdog = threading.Timer(120, other.kill)
    watchdog.start()
    assert on_torchrun.run(asked, view) == 0
    assert other.wait(timeout=60) == 0
    watchdog.cancel()
    assert sorted(file.name for file in tmp_path.glob("rank_*")) == [
        "rank_0",
        "rank_1",
        "rank_2",
        "rank_3",
    ]
    assert (tmp_path / "rank_3").read_text() == "4 2"


@pytest.mark.full
def test_one_machine_needs_no_name_and_meets_on_its_loopback(spec, tmp_path: Path) -> None:
    """On a machine whose name nobody can resolve, as in containers: its own UTS namespace."""
    if subprocess.run(["unshare", "-Ur", "-u", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces of its own for this user")
    program = """
import socket
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
socket.create_connection(address).close()
listens = [line.split()[1] for name in ("tcp", "tcp6")
           for line in open(f"/proc/net/{name}").readlines()[1:] if line.split()[3] == "0A"]
port = f":{address[1]:04X}"
(place / f"rank_{rank}").write_text(json.dumps(
    [address[0], [one for one in listens if one.endswith(port)], os.environ["GLOO_SOCKET_IFNAME"]]))
"""
    (tmp_path / "run.py").write_text(
        "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import on_torchrun\nfrom"
        " launch.progress import ProgressView\nfrom launch.spec import"
        f" LaunchSpec\nsys.exit(on_torchrun.run({spec(program, workers=2)!r}, ProgressView()))\n"
    )
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    name = "hostname nobody-knows-this-name && exec "
    done = subprocess.run(
        ["unshare", "-Ur", "-u", "sh", "-c", f"{name}{sys.executable} {tmp_path / 'run.py'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(scratch.iterdir())
    for rank in range(2):
        address, listens, interface = json.loads((tmp_path / f"rank_{rank}").read_text())
        assert (address, interface) == ("127.0.0.1", "lo")
        assert len(listens) == 1
        assert listens[0].startswith("0100007F:"), "the loopback interface alone"
