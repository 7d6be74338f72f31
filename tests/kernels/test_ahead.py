"""Every kernel compiles for GPUs that are not here, within their shared memory, and hot ones spill
next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SPILL_LIMIT = {
    80: 160,
    90: 32,
    100: 32,
}  # bytes per thread in any kernel; 0 in most, see benchmarks/RESULTS.md for which and why


@pytest.fixture
def compile_ahead(tmp_path):
    """compile_ahead(*arguments) -> rows of the printed table. A process of its own: no interpreter,
    no cache."""

    def run(*arguments: str) -> list[list[str]]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "wm_train.kernels.ahead", *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in done.stdout.splitlines()[2:]
        ]

    return run


def check(rows: list[list[str]]) -> None:
    from wm_train.kernels.ahead import SHARED_LIMIT

    for name, architecture, registers, spilled, shared, _ in rows:
        where = f"{name} for sm_{architecture}"
        assert int(registers) <= 255, where
        assert int(spilled) <= SPILL_LIMIT[int(architecture)], where
        assert int(shared) <= SHARED_LIMIT[int(architecture)], where


@pytest.mark.full
def test_the_main_kernels_compile_for_hopper(compile_ahead):
    rows = compile_ahead("90", "--only", "states E=112", "gram", "output")
    check(rows)
    assert len(rows) == 3
    cores = {name: found for name, *_, found in rows}
    assert cores["gram"] == cores["output"] == "wgmma.mma_async"
    assert (
        cores["states E=112"] == "mma.sync"
    )  # 32 rows of a state; 64 would reach wgmma and one program per multiprocessor


@pytest.mark.full
def test_every_kernel_compiles(compile_ahead, capsys):
    """For sm_80, sm_90 and sm_100; CI shows the table."""
    rows = compile_ahead()
    with capsys.disabled():
        print(
            "\nkernel | sm | registers | spilled bytes | shared bytes | tensor cores",
            *map(" | ".join, rows),
            sep="\n",
        )
    check(rows)
    assert len(rows) == 3 * 23
    assert all(cores != "none" for name, *_, cores in rows if not name.startswith(("norm", "key")))
