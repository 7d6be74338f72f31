"""Output that nobody reads, or that does not fit, ends no run; signals that ask to stop."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.progress import ProgressView
from launch.screen import Screen
from launch.signals import ASKING, caught

ROOT = Path(__file__).resolve().parents[2]
VIEW = """
import sys
from launch.progress import ProgressView
from launch.screen import safe_output
from launch.signed import sign
with safe_output() as output:
    output.note = "lost: {error}"
    with ProgressView(every_s=0) as view:
        for step in range(1, 3000):
            view.feed(sign('progress', view.token, {'step': step, 'steps': 3000, 'loss': 1.0}))
open(sys.argv[1], "w").write("all steps")
"""


@pytest.mark.parametrize(
    ("redirect", "said"),
    [
        ("| head -1", "lost: [Errno 32]"),
        pytest.param("> /dev/full", "lost: [Errno 28]", marks=pytest.mark.full),
        pytest.param(">&-", "", marks=pytest.mark.full),
        (">&- 2>&-", ""),
        pytest.param("<&- >&- 2>&-", "", marks=pytest.mark.full),
        pytest.param("2>&1 | head -1", "", marks=pytest.mark.full),
    ],
)
def test_a_view_that_cannot_write_goes_silent(tmp_path: Path, redirect: str, said: str) -> None:
    (tmp_path / "view.py").write_text(VIEW)
    command = f"set -o pipefail; {sys.executable} view.py ended {redirect}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").read_text() == "all steps"
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr


class Narrow(io.TextIOWrapper):
    """A stream that has no letters beyond ASCII."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_letters_that_the_terminal_lacks_are_escaped() -> None:
    out = Narrow()
    print("µ is 1e-6", file=Screen(out), flush=True)
    assert out.buffer.getvalue() == b"\\xb5 is 1e-6\n"


def test_a_closed_stream_is_no_terminal_and_takes_everything() -> None:
    out = io.StringIO()
    out.close()
    screen = Screen(out)
    print("gone", file=screen, flush=True)
    assert isinstance(screen.lost, ValueError)
    assert not screen.isatty()


@pytest.mark.parametrize(
    "text",
    [
        '{"step": "7", "steps": 9}',
        '{"step": 7, "steps": null}',
        '{"step": true, "steps": 9}',
        '{"step": 1.5, "steps": 9}',
        "[" * 100_000,
        '{"step": ' + "9" * 5000 + ', "steps": 9}',
    ],
)
def test_figures_that_are_none_are_shown_as_text(text: str) -> None:
    view = ProgressView(io.StringIO())
    view.feed(f"@progress {view.token} {text}")
    assert view.last is None
    assert view.out.getvalue() == f"@progress {text}\n"


@pytest.mark.parametrize("number", ASKING)
def test_every_signal_that_asks_is_noted_and_only_a_typed_one_hurries(number: int) -> None:
    before = signal.getsignal(number)
    with caught() as stop:
        signal.raise_signal(number)
        assert stop.number == number
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)
