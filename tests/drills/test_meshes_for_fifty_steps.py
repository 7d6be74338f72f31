"""Fifty steps on every way to spread the work, and across changes of it: the losses of one process,
to one part in a million."""

import pytest

from wm_train.tracking.tracker import read_steps

pytestmark = pytest.mark.drill
STEPS = 50
BATCH = "recipe.stages.short.global_batch=4"
# At the 2e-3 of the other tests the loss does not fall any more, and the last bit, in which sums in
# another order differ, grows tenfold every ten steps: 2e-8 in step 8, 1e-4 in step 46.
RATE = "recipe.stages.short.optimizer.lr=4e-4"


@pytest.fixture(scope="module")
def run_for(worker_config):
    """run_for(run_ranks, folder, workers, steps, *overrides) -> losses of all steps so far."""

    def train(run_ranks, folder, workers, steps, *overrides):
        length = f"recipe.stages.short.steps={steps}"
        run_ranks(
            workers,
            "-m",
            "wm_train.worker",
            "--config",
            worker_config(folder, BATCH, RATE, length, *overrides),
            timeout=900,
        )
        rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        return [row["loss"] for row in rows]

    return train


@pytest.fixture(scope="module")
def reference():
    """The losses of one process, once they are known."""
    return []


@pytest.fixture
def one_process(reference, run_for, run_ranks, tmp_path_factory):
    if not reference:
        reference.extend(run_for(run_ranks, tmp_path_factory.mktemp("one"), 1, STEPS))
    return reference


def worst(losses, expected):
    figure = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    print(f"largest relative difference {figure:.1e}")
    return figure


@pytest.mark.parametrize(
    ("workers", "overrides"),
    [
        (1, ("trainer.accumulate=2",)),
        (2, ()),
        (4, ()),
        (4, ("parallel.dp_replicate=2",)),
        (2, ("parallel.cp=2",)),
    ],
    ids=["accumulated", "fsdp 2", "fsdp 4", "hsdp 2x2", "cp 2"],
)
def test_every_mesh_trains_as_one_process(
    run_for, one_process, run_ranks, tmp_path, workers, overrides
):
    assert worst(run_for(run_ranks, tmp_path, workers, STEPS, *overrides), one_process) <= 1e-6


@pytest.mark.parametrize(
    "override",
    [
        "model.activation_checkpointing=block",
        "model.activation_checkpointing=selective",
        "trainer.async_checkpoint=false",
    ],
    ids=["checkpointed", "selective", "synchronous saves"],
)
def test_what_only_moves_memory_or_time_changes_no_bit(
    run_for, one_process, run_ranks, tmp_path, override
):
    assert run_for(run_ranks, tmp_path, 1, STEPS, override) == one_process


CHANGES = {
    "1, 2, 4 workers": [(1, ()), (2, ()), (4, ())],
    "4, 2, 1 workers": [(4, ()), (2, ()), (1, ())],
    "cp 1, 2, 1": [(2, ()), (2, ("parallel.cp=2",)), (2, ())],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_elsewhere_with_the_same_samples(
    run_for, one_process, run_ranks, tmp_path, change
):
    losses = []
    for (workers, overrides), steps in zip(CHANGES[change], (15, 30, STEPS), strict=True):
        losses = run_for(run_ranks, tmp_path, workers, steps, *overrides)
    assert worst(losses, one_process) <= 1e-6, (
        "another sample or noise would differ in the first digits"
    )
