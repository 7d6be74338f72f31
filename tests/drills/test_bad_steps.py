"""NaN on one rank, an infinite gradient, a loss a thousand times too large: `stop` ends all ranks
before the update, with the parameters unchanged to the bit; `skip` equals the run without that
batch."""

import pytest
import torch

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

# Two ranks with one clip each, so that what is wrong on one must stop the other. A spike is judged
# against the median of eight steps.
COMMON = ("trainer.spike_factor=20", "trainer.checkpoint_every=11")
BAD = 12


def tensors(folder):
    found = store.committed(folder / "demo" / "short" / "checkpoints")[-1]
    manifest = read_manifest(found)
    targets = {name: torch.empty(entry.shape) for name, entry in manifest.tensors.items()}
    store.load(found, manifest, targets)
    return manifest.step, targets


def same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][n], other[1][n]) for n in one[1])
    )


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["nan", "inf-gradient", "x1000"])
def test_stop_ends_all_ranks_before_the_update(worker_config, tmp_path, start_ranks, outcome, kind):
    good, bad = tmp_path / "good", tmp_path / "bad"
    until = f"recipe.stages.short.steps={BAD - 1}"
    assert [code for code, _ in outcome(start_ranks(worker_config(good, *COMMON, until), 2))] == [
        0,
        0,
    ]
    # The state of every rank is written when the guard raises: it must be the one after the step
    # before.
    results = outcome(
        start_ranks(
            worker_config(bad, *COMMON, "recipe.stages.short.steps=20"), 2, (f"{kind}", 1, BAD)
        )
    )
    assert [code for code, _ in results] == [1, 1]
    for _, said in results:
        assert f"BadStepError: step {BAD}: got" in said
        assert f"Parameters are as after step {BAD - 1}" in said
    states = [torch.load(bad / f"state_of_rank_{rank}.pt", weights_only=True) for rank in range(2)]
    reference = tensors(good)[1]
    for name, whole in reference.items():
        parts = [state[name] for state in states if name in state]
        found = parts[0] if parts[0].shape == whole.shape else torch.cat(parts)
        assert torch.equal(found, whole), name
    print(f"{kind}: step {BAD} stopped on both ranks, {len(reference)} tensors equal to the bit")


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["nan", "inf-gradient", "x1000"])
def test_skip_equals_the_run_without_that_batch(
    worker_config, tmp_path, start_ranks, outcome, kind
):
    without, skipped = tmp_path / "without", tmp_path / "skipped"
    assert [
        code
        for code, _ in outcome(
            start_ranks(worker_config(without, *COMMON, f"trainer.skip_steps=[{BAD}]"), 2)
        )
    ] == [0, 0]
    config = worker_config(skipped, *COMMON, "trainer.on_bad_step=skip")
    assert [code for code, _ in outcome(start_ranks(config, 2, (kind, 1, BAD)))] == [0, 0]
    assert same(tensors(without), tensors(skipped))
    rows = read_steps(skipped / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped"]] == [BAD]
    print(f"{kind}: step {BAD} skipped, final state equal to the bit")
