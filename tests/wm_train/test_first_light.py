"""The whole pipeline on recorded gameplay: the mesh never changes the losses, and a killed run ends like an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _pytest.tmpdir import TempPathFactory

from wm_train import checkpoint
from wm_train.compose import compose, to_json
from wm_train.tracking import read_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def data_command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"data_shards.{module}", *arguments], cwd=ROOT, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def gameplay(tmp_path_factory: TempPathFactory) -> Path:
    """A small data set of real gameplay: 8 clips of 41 frames."""
    folder = tmp_path_factory.mktemp("gameplay")
    data_command("record", "vizdoom", f"out={folder / 'recording'}", "clips=8", "frames=41", "fps=16")
    data_command("encode", f"source={folder / 'recording'}", "codec=linear", f"out={folder / 'shards'}")
    return folder / "shards"


def write_config(folder: Path, data: Path, *overrides: str) -> Path:
    """The resolved config of a short demo stage in `folder`, smaller than the demo's so that a run takes seconds."""
    base = ["experiment=demo", "stage=short", f"data.path={data}", f"out={folder}", "tracker=none", "trainer.samples=0"]
    small = ["model.width=64", "model.depth=4", "recipe.stages.short.global_batch=2", "recipe.stages.short.frames=41"]
    run = compose([*base, *small, f"recipe.stages.short.steps={STEPS}", "trainer.checkpoint_every=5", *overrides])
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(run))
    return path


def losses(folder: Path) -> list[float]:
    rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="session")
def alone(gameplay: Path, tmp_path_factory: TempPathFactory) -> list[float]:
    """The losses of the undisturbed run on one process: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(write_config(folder, gameplay))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)


def run_worker(run_ranks, folder: Path, data: Path, count: int, *overrides: str) -> list[float]:
    run_ranks(count, "-m", "wm_train.worker", "--config", write_config(folder, data, *overrides))
    return losses(folder)


def test_the_same_seed_gives_bit_identical_losses(gameplay, alone, tmp_path, run_ranks):
    assert run_worker(run_ranks, tmp_path, gameplay, 1) == alone


def test_another_seed_gives_other_losses(gameplay, alone, tmp_path, run_ranks):
    assert run_worker(run_ranks, tmp_path, gameplay, 1, "seed=1") != alone


@pytest.mark.parametrize("mesh", ["parallel.cp=2", "parallel.cp=1"], ids=["cp2", "dp2"])
def test_two_processes_give_the_losses_of_one(gameplay, alone, tmp_path, run_ranks, mesh):
    together = run_worker(run_ranks, tmp_path, gameplay, 2, mesh)
    assert together == pytest.approx(alone, rel=1e-5, abs=0)


def test_a_killed_run_ends_with_the_curve_of_the_undisturbed_one(gameplay, alone, tmp_path):
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(write_config(tmp_path, gameplay))]
    root = tmp_path / "demo" / "short" / "checkpoints"
    victim = subprocess.Popen(command, cwd=ROOT, env={**os.environ}, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not checkpoint.committed(root) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert checkpoint.committed(root), "killed before the first checkpoint"
    assert not (root / f"step_{STEPS:08d}").exists(), "killed too late to test anything"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout
    assert losses(tmp_path) == alone


def test_continuing_with_another_seed_is_refused(gameplay, tmp_path, run_ranks):
    run_worker(run_ranks, tmp_path, gameplay, 1)
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(write_config(tmp_path, gameplay, "seed=7"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "seed was 0 and is now 7" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 7
