"""One worker as a child: environment, exit codes, signals; and no worker outlives its launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import inline
from launch.child import Child
from launch.leash import leashed


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Return whether process `pid` ends in time (or is a zombie that no parent has reaped)."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def pid_in(file: Path, within_s: float = 20.0) -> int:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if file.exists() and file.read_text().strip():
            return int(file.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear")


def test_environment_config_and_output(spec, view) -> None:
    program = """
names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GREETING"
print(json.dumps({k: os.environ[k] for k in names}))
assert int(os.environ["MASTER_PORT"]) > 1023 and open(sys.argv[1]).read() == "{}"
progress(3, 9)
sys.stdout.write('no newline')
"""
    assert inline.run(spec(program, environment={"GREETING": "hello"}), view) == 0
    said = view.out.getvalue().splitlines()
    assert (
        said[0] == '{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",'
        ' "MASTER_ADDR": "127.0.0.1", "GREETING": "hello"}'
    )
    assert said[-1] == "no newline"
    assert view.step == 3


@pytest.mark.parametrize(
    ("program", "code"),
    [("sys.exit(3)", 3), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137), ("1/0", 1)],
)
def test_the_exit_code_is_the_workers(spec, view, program: str, code: int) -> None:
    assert inline.run(spec(program), view) == code


def test_more_workers_than_one_are_refused(spec, view) -> None:
    with pytest.raises(ValueError, match=r"launcher\.workers=1"):
        inline.run(spec("", workers=2), view)


def test_sigterm_is_handed_on_and_the_worker_may_finish_its_work(
    spec, view, tmp_path: Path
) -> None:
    program = """
def stop(*_):
    print("saved"); sys.exit(7)
signal.signal(signal.SIGTERM, stop)
(place / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
    before = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(
        target=lambda: (pid_in(tmp_path / "pid"), os.kill(os.getpid(), signal.SIGTERM))
    )
    killer.start()
    assert inline.run(spec(program), view) == 7
    killer.join()
    assert "saved" in view.out.getvalue()
    assert signal.getsignal(signal.SIGTERM) is before, "our handler must not stay"


@pytest.mark.parametrize(
    ("number", "left"),
    [
        ("INT", 75),
        ("HUP", -signal.SIGTERM),
        pytest.param("QUIT", 0, marks=pytest.mark.full),
        pytest.param("TERM", 75, marks=pytest.mark.full),
    ],
)
def test_every_signal_lets_the_worker_save_and_gives_its_own_exit_code(
    spec, view, tmp_path: Path, number: str, left: int
) -> None:
    """Sent as a terminal does, to the whole group of processes, so to the worker as well."""
    leave = f"sys.exit({left})" if left >= 0 else f"os.kill(os.getpid(), {-left})"
    program = f"""
def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (place / "saved").touch()
    {leave}
signal.signal(signal.SIGTERM, stop)
(place / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
    (tmp_path / "run.py").write_text(
        "import sys\nfrom pathlib import Path, PosixPath\nfrom launch import inline\nfrom"
        " launch.progress import ProgressView\nfrom launch.spec import"
        f" LaunchSpec\nsys.exit(inline.run({spec(program)!r}, ProgressView()))\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        env={**os.environ, "PYTHONPATH": str(Path(inline.__file__).parents[1])},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    worker = pid_in(tmp_path / "pid")
    signum = signal.Signals[f"SIG{number}"]
    os.killpg(run.pid, signum)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signum, said
    assert (tmp_path / "saved").exists()
    assert said == f"stopped by signal {signum}\n"
    assert gone(worker)


def test_a_second_ctrl_c_does_not_wait(spec, view, tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: (place / "asked").write_text("1"))
(place / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(1)
"""

    def type_twice() -> None:
        pid_in(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGINT)
        pid_in(tmp_path / "asked")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=type_twice).start()
    with pytest.raises(KeyboardInterrupt):
        inline.run(spec(program), view)
    assert gone(pid_in(tmp_path / "pid"))


def test_a_worker_dies_with_its_launcher(tmp_path: Path) -> None:
    inner = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
        " time.sleep(300)"
    )
    outer = (
        "import subprocess, sys; from launch.leash import leashed;"
        f" subprocess.run(leashed([sys.executable, '-c', {inner!r}]))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", outer],
        env={**os.environ, "PYTHONPATH": str(Path(inline.__file__).parents[1])},
    )
    worker = pid_in(tmp_path / "pid")
    parent.kill()
    parent.wait()
    assert gone(worker)


def test_a_leash_to_a_dead_parent_starts_nothing() -> None:
    command = leashed([sys.executable, "-c", "print('alive')"])
    command[command.index(str(os.getpid()))] = "999999999"
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_stopping_a_child_takes_its_children_too(tmp_path: Path) -> None:
    program = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(inner.pid)); time.sleep(300)"
    )
    child = Child([sys.executable, "-c", program], {}, tmp_path, tmp_path / "logs" / "rank_0.log")
    grandchild = pid_in(tmp_path / "pid")
    assert child.stop(grace_s=0.2) == -signal.SIGKILL
    assert gone(grandchild)


def test_a_child_keeps_its_log_and_its_last_lines(tmp_path: Path) -> None:
    child = Child(
        [sys.executable, "-c", "for i in range(50): print('line', i)\nraise SystemExit(4)"],
        {},
        tmp_path,
        tmp_path / "a" / "log",
    )
    seen, code = [], None
    while code is None:
        lines, code = child.wait(5.0, for_lines=True)
        seen += lines
    assert (code, len(seen), child.tail[-1]) == (4, 50, "line 49")
    assert (tmp_path / "a" / "log").read_text().splitlines() == seen


def test_a_port_is_none_that_somebody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free = (inline.free_port("127.0.0.1") for _ in range(2))
    monkeypatch.setattr(inline, "PORTS", range(taken, taken + 1))
    monkeypatch.setattr(inline, "DRAWS", 1)
    with socket.create_server(("127.0.0.1", taken)):
        with pytest.raises(OSError, match="in use"):
            inline.free_port("127.0.0.1")
        monkeypatch.setattr(inline, "PORTS", (taken, free))
        monkeypatch.setattr(inline, "DRAWS", 2)
        assert {inline.free_port("127.0.0.1") for _ in range(20)} == {free}
