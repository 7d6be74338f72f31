"""A slow rank is named within ten steps and a waiting one is not blamed; a flipped bit in a replica
is found and the rank named."""

import re

import pytest

QUICK = ("recipe.stages.short.steps=16", "trainer.checkpoint_every=16")


@pytest.mark.drill
@pytest.mark.parametrize(
    ("count", "slow", "mesh"),
    [
        (2, 0, "parallel.cp=2"),
        (2, 1, "parallel.cp=1"),
        (2, 1, "parallel.dp_replicate=2"),
        (3, 1, "recipe.stages.short.global_batch=3"),
    ],
)
def test_a_slow_rank_is_named_and_a_waiting_one_is_not(
    worker_config, tmp_path, start_ranks, outcome, count, slow, mesh
):
    results = outcome(start_ranks(worker_config(tmp_path, *QUICK, mesh), count, ("slow", slow, 3)))
    assert [code for code, _ in results] == [0] * count, results
    named = re.findall(r"rank (\d+) is slow \(step (\d+), section (\w+)\)", results[0][1])
    print(f"{count} ranks, {mesh}: {named}")
    assert {(rank, section) for rank, _, section in named} == {(str(slow), "train")}
    assert int(named[0][1]) <= 3 + 10


@pytest.mark.drill
@pytest.mark.parametrize(
    ("count", "words"), [(2, "ranks 0, 1 hold other bits"), (3, "rank 1 holds other bits")]
)
def test_a_flipped_bit_in_a_replica_is_found(
    worker_config, tmp_path, start_ranks, outcome, count, words
):
    mesh = (f"parallel.dp_replicate={count}", f"recipe.stages.short.global_batch={count}")
    config = worker_config(tmp_path, *QUICK, *mesh, "trainer.sdc_every=4")
    results = outcome(start_ranks(config, count, ("flip", 1, 6)))
    assert [code for code, _ in results] == [1] * count, results
    for _, said in results:
        assert f"step 8: {words}" in said
    assert not list((tmp_path / "demo" / "short" / "checkpoints").glob("step_*[0-9]"))
    print(re.search(r"step 8: .*", results[0][1])[0])
