"""Runs the checks of `interpreted/` in a process whose Triton is an interpreter: that must be
decided before its first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture
def run_checks():
    def run(files: list[str], marker: str, limit_s: float) -> str:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", marker]
        command += [str(HERE / "interpreted" / name) for name in files]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    return run


CHECKS = sorted(path.name for path in (HERE / "interpreted").glob("*_checks.py"))
KERNELS = ["scan_checks.py", "token_checks.py"]  # the others use these in a model and in trials


def test_kernels_equal_fp64_in_the_interpreter(run_checks):
    """Every pair of axis values; about 25 cases per kernel."""
    assert " passed" in run_checks(KERNELS, "not full", 400)


@pytest.mark.full
@pytest.mark.parametrize("file", CHECKS)
def test_the_whole_product_of_cases(run_checks, file):
    assert " passed" in run_checks([file], "full or not full", 7200)
