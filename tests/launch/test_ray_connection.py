"""Connect a driver to Ray: a local one of its own, or a running cluster; never an open
dashboard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from launch import on_ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_a_local_ray_is_started_and_ended_without_a_dashboard_or_statistics_and_with_a_token(
    spec, view, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `cluster`, which has set the token's path; Ray reads it once per process."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    seen: list[str] = []
    secrets_shown: list[str] = []
    before = subprocess.run(
        ["ps", "-ww", "-eo", "args"], capture_output=True, text=True
    ).stdout.splitlines()

    def watch() -> None:
        while not stop.wait(0.3):
            found = subprocess.run(
                ["ps", "-ww", "-eo", "args"], capture_output=True, text=True
            ).stdout
            seen.extend(
                line
                for line in found.splitlines()
                if "dashboard/dashboard.py" in line and line not in before
            )
            token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            secrets_shown.extend(
                line for line in found.splitlines() if token.exists() and token.read_text() in line
            )

    stop = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    program = "assert os.environ['RAY_USAGE_STATS_ENABLED'] == '0'; time.sleep(1); print('done')"
    code = on_ray.run(spec(program, workers=3, environment={}), view)
    stop.set()
    watcher.join()
    assert code == 0, view.out.getvalue()
    assert "done" in view.out.getvalue()
    import ray

    assert not ray.is_initialized()
    # Ray runs this process in any case; without its front end it listens nowhere.
    assert seen, "the watcher saw no Ray"
    assert all("--disable-frontend" in line and "--host=127.0.0.1" in line for line in seen)
    assert not secrets_shown
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() not in view.out.getvalue()


@pytest.mark.parametrize(("failures", "code"), [(2, 0), (3, 2)])
def test_a_ray_of_our_own_that_does_not_come_up_is_started_again(
    spec, view, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: int, code: int
) -> None:
    import ray

    from launch import attempt

    started: list[dict[str, object]] = []
    ours, place = f"session_2026_{os.getpid()}", tmp_path / "ray"
    for name in (ours, "session_2026_1"):  # and somebody else's
        (place / name).mkdir(parents=True)
    (place / "session_latest").symlink_to(place / ours)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def init(**options: object) -> None:
        started.append(options)
        if len(started) <= failures:
            raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(attempt, "run_attempt", lambda *arguments: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert on_ray.run(spec(""), view) == code
    assert len(started) == 3
    shown = view.out.getvalue()
    assert shown.count("got The current node timed out during startup.; trying again") == 2
    assert ("3 times, expected a Ray on this machine. Fix:" in shown) is (code == 2)
    kept = {path.name for path in place.iterdir()}
    assert kept == {"session_2026_1", *((ours, "session_latest") if code else ())}


@pytest.mark.full
def test_three_rays_that_start_at_the_same_time_do_not_disturb_each_other(
    spec, tmp_path: Path
) -> None:
    """Each with two ranks, which meet at a port that their own driver has drawn."""
    program = """
import socket
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:
    with socket.create_server(address) as server:
        assert server.accept()[0].recv(9).decode() == os.environ["WHOSE"]
else:
    for attempt in range(100):
        try:
            socket.create_connection(address).sendall(os.environ["WHOSE"].encode())
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
"""
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    drivers = []
    for number in range(3):
        asked = spec(
            program,
            workers=2,
            environment={"WHOSE": str(number)},
            logs=tmp_path / str(number),
            place_s=90.0,
        )
        (tmp_path / f"driver_{number}.py").write_text(
            "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import on_ray\nfrom"
            " launch.progress import ProgressView\nfrom launch.spec import"
            f" LaunchSpec\nsys.exit(on_ray.run({asked!r}, ProgressView()))\n"
        )
        command = [sys.executable, str(tmp_path / f"driver_{number}.py")]
        environment = {
            **variables,
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        }
        drivers.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [driver.communicate(timeout=300)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * 3, "\n".join(said)
    assert not any("died" in text for text in said), "\n".join(said)


def test_a_cluster_that_is_not_there_is_a_users_mistake(
    spec, view, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    assert on_ray.run(spec("", address="127.0.0.1:1"), view) == 2
    assert time.monotonic() - started < 60
    assert "joining Ray: got" in view.out.getvalue()


@pytest.mark.parametrize(
    ("endpoint", "inside"),
    [
        ("127.0.0.1:8265", True),
        ("http://localhost:8265", True),
        ("[::1]:8265", True),
        ("10.0.0.5:8265", False),
        ("0.0.0.0:8265", False),
    ],
)
def test_which_dashboards_are_on_loopback(endpoint: str, inside: bool) -> None:
    assert on_ray.on_loopback(endpoint) is inside


@pytest.mark.parametrize(("mode", "code"), [("", 2), ("token", 0)])
def test_an_open_dashboard_is_refused_unless_it_asks_for_a_token(
    spec, view, monkeypatch: pytest.MonkeyPatch, mode: str, code: int
) -> None:
    import ray

    from launch import attempt

    context = type("Context", (), {"address_info": {"webui_url": "10.0.0.5:8265"}})()
    monkeypatch.setattr(ray, "init", lambda **options: context)
    monkeypatch.setattr(attempt, "run_attempt", lambda *arguments: None)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert on_ray.run(spec("", address="auto"), view) == code
    assert ("got a dashboard at 10.0.0.5:8265 without authentication" in view.out.getvalue()) is (
        code == 2
    )


@pytest.mark.drill
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_ray_of_our_own_that_breaks_is_started_again(spec, tmp_path: Path, part: str) -> None:
    program = """
(place / f"begun_{rank}_{os.getpid()}").touch()
if (place / "killed").exists():
    print("finished")
else:
    time.sleep(300)
"""
    asked = spec(program, workers=2, max_restarts=1, place_s=60.0)
    (tmp_path / "driver.py").write_text(
        "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import on_ray\nfrom"
        " launch.progress import ProgressView\nfrom launch.spec import"
        f" LaunchSpec\nsys.exit(on_ray.run({asked!r}, ProgressView()))\n"
    )
    with tempfile.TemporaryDirectory(prefix="d") as scratch:
        driver = subprocess.Popen(
            [sys.executable, str(tmp_path / "driver.py")],
            env={
                **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
                "PYTHONPATH": str(ROOT),
                "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
                "TMPDIR": scratch,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        limit = time.monotonic() + 120
        while len(list(tmp_path.glob("begun_*"))) < 2 and time.monotonic() < limit:
            time.sleep(0.1)
        (tmp_path / "killed").touch()
        children = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(driver.pid)],
            capture_output=True,
            text=True,
        ).stdout
        victims = [
            int(line.split()[0])
            for line in children.splitlines()
            if line.split()[1].endswith(f"/{part}")
        ]
        assert len(victims) == 1, children
        os.kill(victims[0], signal.SIGKILL)
        said = driver.communicate(timeout=300)[0]
        assert driver.returncode == 0, said
        assert f"has ended ({part}): starting Ray again" in said, said
        assert "finished" in said
        assert "Traceback" not in said
        assert not list(Path(scratch).iterdir())


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("ray://127.0.0.1:10001", "RAY_ADDRESS=127.0.0.1:6379"),
        ("http://head.cluster:8265", "RAY_ADDRESS=head.cluster:6379"),
        ("https://head.cluster/path", "RAY_ADDRESS=head.cluster:6379"),
        ("tcp://10.0.0.5:6379", "RAY_ADDRESS=10.0.0.5:6379"),
        ("RAY://[::1]:10001", "RAY_ADDRESS=[::1]:6379"),
    ],
)
def test_an_address_of_another_service_is_refused_with_the_one_that_is_meant(
    spec, view, monkeypatch: pytest.MonkeyPatch, address: str, fix: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert on_ray.run(spec(""), view) == 2
    assert f"joining Ray: got {address}" in view.out.getvalue()
    assert f"Fix: {fix}" in view.out.getvalue()
    for good in ("auto", "local", "head:6379", "127.0.0.1:6379", "[::1]:6379"):
        assert on_ray.refused(good) is None


def test_a_folder_too_long_for_sockets_is_named_once(
    spec, view, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    def init(**options: object) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /tmp/x")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 95)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert on_ray.run(spec(""), view) == 2
    said = view.out.getvalue()
    assert "which is 100 bytes long, expected at most" in said
    assert "Fix: RAY_TMPDIR=/tmp" in said
    assert "again" not in said
