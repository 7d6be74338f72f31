"""DeepSpeed ZeRO-3 against FSDP2 on two gloo processes: the same losses, and each goes on from the other's checkpoints."""

import pytest

pytestmark = pytest.mark.full
ZERO = "parallel.sharding=zero3"
HALF = "recipe.stages.short.steps=10"


@pytest.fixture
def train_on_two(worker_config, run_ranks):
    pytest.importorskip("deepspeed")

    def train(folder, *overrides):
        run_ranks(2, "-m", "wm_train.worker", "--config", worker_config(folder, *overrides), timeout=400)

    return train


@pytest.mark.parametrize(
    "overrides",
    [(), ("trainer.accumulate=2", "recipe.stages.short.global_batch=4"), ("parallel.cp=2",), ("model.activation_checkpointing=selective",)],
    ids=["dp", "accumulated", "cp", "selective"],
)
def test_losses_are_those_of_fsdp(train_on_two, losses, tmp_path, overrides):
    train_on_two(tmp_path / "fsdp", *overrides)
    train_on_two(tmp_path / "zero3", ZERO, *overrides)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "fsdp"), rel=1e-6, abs=0)


def test_each_goes_on_from_the_checkpoint_of_the_other(train_on_two, losses, tmp_path):
    held_out = ("trainer.validation_clips=2", "trainer.validate_every=5")
    train_on_two(tmp_path / "fsdp", *held_out)
    for name, first, second in (("to zero3", (), (ZERO,)), ("from zero3", (ZERO,), ())):
        train_on_two(tmp_path / name, HALF, *held_out, *first)
        train_on_two(tmp_path / name, *held_out, *second)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "fsdp"), rel=1e-6, abs=0)
