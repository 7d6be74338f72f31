"""No line between the loader and the optimizer names a device: a whole step runs on one that is not
there, and a stray literal raises."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.full
def test_training_steps_run_on_a_fake_npu_and_a_stray_cuda_raises(worker_config, tmp_path):
    config = worker_config(
        tmp_path,
        "backend=auto",
        "launcher.workers=1",
        "parallel.precision=bf16",
        "backend.attention=plain",
    )
    command = [sys.executable, HERE / "npu_step.py", config]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=HERE.parent.parent, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    took, found = done.stdout.strip().splitlines()[-2:]
    assert took == "took 2 steps on npu:0"
    assert found.startswith("found:")
    assert "cuda" in found
    assert "npu" in found
