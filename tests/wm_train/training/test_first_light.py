"""The whole pipeline on recorded gameplay: the mesh never changes the losses, and a killed run ends
like an undisturbed one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_train.checkpoint import store

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.full
def test_the_same_seed_gives_bit_identical_losses(
    alone, worker_config, losses, tmp_path, run_ranks
):
    run_ranks(1, "-m", "wm_train.worker", "--config", worker_config(tmp_path))
    assert losses(tmp_path) == alone


@pytest.mark.full
def test_another_seed_gives_other_losses(alone, train_here, losses, tmp_path):
    train_here(tmp_path, "seed=1")
    assert losses(tmp_path) != alone


@pytest.mark.parametrize(
    "mesh",
    ["parallel.cp=2", pytest.param("parallel.cp=1", marks=pytest.mark.full)],
    ids=["cp2", "dp2"],
)
def test_two_processes_give_the_losses_of_one(
    alone, worker_config, losses, tmp_path, run_ranks, mesh
):
    run_ranks(2, "-m", "wm_train.worker", "--config", worker_config(tmp_path, mesh))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5, abs=0)


@pytest.mark.full  # tests/outside kills and resumes a smaller model in the quick suite
def test_a_killed_run_ends_with_the_curve_of_the_undisturbed_one(
    alone, worker_config, losses, tmp_path
):
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(worker_config(tmp_path))]
    root = tmp_path / "demo" / "short" / "checkpoints"
    victim = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not store.committed(root) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert store.committed(root), "killed before the first checkpoint"
    assert not (root / "step_00000020").exists(), "killed too late to test anything"
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout
    assert losses(tmp_path) == alone


@pytest.mark.full
def test_sigterm_saves_leaves_with_its_own_exit_code_and_the_run_goes_on(
    alone, worker_config, losses, tmp_path
):
    command = [
        sys.executable,
        "-m",
        "wm_train.worker",
        "--config",
        str(worker_config(tmp_path, "trainer.checkpoint_every=1000")),
    ]
    asked = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert asked.stdout is not None
    while "@progress" not in (line := asked.stdout.readline()):
        assert line, "the worker ended before its first step"
    asked.send_signal(signal.SIGTERM)
    _, errors = asked.communicate(timeout=30)  # what is promised
    assert asked.returncode == 75, errors
    assert "asked to stop: saved after step" in errors
    assert len(store.committed(tmp_path / "demo" / "short" / "checkpoints")) == 1
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode
        == 0
    )
    assert losses(tmp_path) == alone
