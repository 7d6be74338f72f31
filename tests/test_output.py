"""Commands whose reader has gone, or whose output does not fit: one line at most, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# the reader closes the pipe before anything is written
GONE, FULL = "| { exec 0<&-; sleep 3; }", "> /dev/full"


@pytest.mark.parametrize(
    ("module", "where", "code", "said"),
    [
        ("wm_train.launch", GONE, 0, ""),
        pytest.param("wm_train.launch", FULL, 74, "output: got [Errno 28]", marks=pytest.mark.full),
        pytest.param("wm_train.launch", ">&-", 0, "", marks=pytest.mark.full),
        pytest.param("data_shards.stats", GONE, 141, "", marks=pytest.mark.full),
        ("data_shards.stats", FULL, 74, "output: got [Errno 28]"),
        pytest.param("data_shards.stats", ">&-", 0, "", marks=pytest.mark.full),
    ],
)
def test_help_that_cannot_be_shown(module: str, where: str, code: int, said: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m {module} --help {where}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said), done.stderr


@pytest.mark.full
def test_a_ctrl_c_before_anything_runs_needs_no_traceback() -> None:
    """While modules are imported or the configuration is composed."""
    program = (
        "import os, runpy, signal, sys, threading; sys.argv = ['launch', '--help'];"
        "threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start();"
        "import wm_train.config.help as help;"
        "help.help_text = lambda extra: __import__('time').sleep(30);"
        "runpy.run_module('wm_train.launch', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "")
