"""DeepSpeed ZeRO-3 against FSDP2 on two gloo processes: the same losses, and each goes on from the
other's checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[3]
ZERO = "parallel.sharding=zero3"
HALF = "recipe.stages.short.steps=10"


@pytest.fixture
def train_on_two(worker_config, run_ranks):
    pytest.importorskip("deepspeed")

    def train(folder, *overrides):
        run_ranks(
            2, "-m", "wm_train.worker", "--config", worker_config(folder, *overrides), timeout=900
        )  # the first start compiles

    return train


@pytest.fixture
def start_worker():
    """start_worker(config, **environment): exit code and output of one worker."""
    pytest.importorskip("deepspeed")

    def start(config, **more):
        command = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
        environment = {**os.environ, "WORLD_SIZE": "1", **more}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return start


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.accumulate=2", "recipe.stages.short.global_batch=4"),
        ("parallel.cp=2",),
        ("model.activation_checkpointing=block",),
        (
            "model.width=128",
            "recipe.stages.short.optimizer.clip_norm=1000",
        ),  # norms above DeepSpeed's own bound, 1
    ],
    ids=["dp", "accumulated", "cp", "checkpointed", "unclipped"],
)
def test_losses_are_those_of_fsdp(train_on_two, losses, tmp_path, overrides):
    train_on_two(tmp_path / "fsdp", *overrides)
    train_on_two(tmp_path / "zero3", ZERO, *overrides)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "fsdp"), rel=1e-6, abs=0)


# Gradients are clipped at every step, two steps are left out, and matrices are large enough to go
# to the disk.
OFFLOADED = (
    "model.width=128",
    "recipe.stages.short.optimizer.clip_norm=0.05",
    "trainer.skip_steps=[1,8]",
    "trainer.accumulate=2",
    "recipe.stages.short.global_batch=4",
    "trainer.validation_clips=2",
    "trainer.validate_every=5",
)


def offload(kind: str, folder: Path) -> tuple[str, ...]:
    return (
        ZERO,
        f"parallel.offload_state={kind}",
        *([f"parallel.nvme_path={folder}"] if kind == "nvme" else []),
    )


def runs_here(kind: str) -> bool:
    if kind == "cpu":
        return True
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_state_elsewhere_changes_nothing(train_on_two, losses, tmp_path, kind):
    """In host memory or in files: losses, held-out losses of the average, and a second start from a
    checkpoint."""
    if not runs_here(kind):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")
    train_on_two(tmp_path / "fsdp", *OFFLOADED)
    for steps in (HALF, "recipe.stages.short.steps=20"):
        train_on_two(tmp_path / kind, *OFFLOADED, *offload(kind, tmp_path), steps)
    assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "fsdp"), rel=1e-6, abs=0)
    there, here = (
        read_steps(tmp_path / name / "demo" / "short" / "metrics.jsonl") for name in (kind, "fsdp")
    )
    assert [row["grad_norm"] for row in there] == pytest.approx(
        [row["grad_norm"] for row in here], rel=1e-4, abs=0
    )
    held_out = [
        [row["validation_loss"] for row in rows if "validation_loss" in row]
        for rows in (there, here)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6, abs=0)
    assert len(held_out[0]) == 4
    ranks = list(tmp_path.rglob("zero_stage_3/optimizer"))
    assert len(ranks) == (kind == "nvme")
    assert not any(list(folder.iterdir()) for folder in ranks), (
        "what is not needed again is removed"
    )


@pytest.mark.parametrize("preflight", [True, False])
def test_a_machine_that_cannot_use_a_disk_says_so_before_it_starts(
    worker_config, start_worker, tmp_path, preflight
):
    config = worker_config(tmp_path, *offload("nvme", tmp_path), f"launcher.preflight={preflight}")
    code, said = start_worker(config, CC="false")  # a compiler that fails finds no libaio
    assert code == 2, said
    assert "offload: got nvme where DeepSpeed's async_io cannot be built, expected libaio" in said
    assert "Fix: install libaio-dev, or parallel.offload_state=cpu" in said


def test_a_folder_that_is_not_there_is_named(worker_config, start_worker, tmp_path):
    if not runs_here("nvme"):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")
    code, said = start_worker(worker_config(tmp_path, *offload("nvme", tmp_path / "nowhere")))
    assert code == 2, said
    assert "nowhere, expected a folder that can be written (key parallel.nvme_path)" in said


def test_each_goes_on_from_the_checkpoint_of_the_other(train_on_two, losses, tmp_path):
    held_out = ("trainer.validation_clips=2", "trainer.validate_every=5")
    train_on_two(tmp_path / "fsdp", *held_out)
    for name, first, second in (("to zero3", (), (ZERO,)), ("from zero3", (ZERO,), ())):
        train_on_two(tmp_path / name, HALF, *held_out, *first)
        train_on_two(tmp_path / name, *held_out, *second)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "fsdp"), rel=1e-6, abs=0)
