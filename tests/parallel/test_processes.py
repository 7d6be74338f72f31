"""Real processes (gloo) against virtual ranks: the same programs in the same order, so the same
bits."""

from __future__ import annotations

import pytest
import torch

from parallel.virtual import run_virtual


def same_bits(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (
                f"{name}: off by {(a[name] - b[name]).abs().max()}"
            )


SPREAD = ([[0, 2], [1, 3]], [(1, 2), (2, 1)])  # two sequence groups, neither contiguous


@pytest.mark.parametrize(
    ("task", "world", "parts"),
    [
        ("two", 2, [([[0, 1]], [(1, 2), (2, 1)])]),
        pytest.param(
            "four", 4, [([[0, 1, 2, 3]], [(1, 4), (4, 1), (2, 2)]), SPREAD], marks=pytest.mark.full
        ),
    ],
)
def test_processes_equal_virtual_ranks_bit_for_bit(processes, oracles, task, world, parts):
    by_rank = [iter(results["verbs"]) for results in processes(task, world)]
    cases = oracles.process_cases()
    for lines, grids in parts:
        for ring, ulysses in grids:
            runs = [oracles.virtual_run(case, ring, ulysses) for case in cases]
            for rank, index in sorted(
                (rank, index) for line in lines for index, rank in enumerate(line)
            ):
                for members, _ in runs:
                    same_bits(next(by_rank[rank]), members[index])
                collectives, sent = next(by_rank[rank])
                assert collectives
                for label in collectives:
                    assert collectives[label] == sum(
                        traffic[index].collectives.get(label, 0) for _, traffic in runs
                    ), label
                    assert sent[label] == sum(
                        traffic[index].sent.get(label, 0) for _, traffic in runs
                    ), label


@pytest.mark.parametrize(
    ("task", "world", "grids"),
    [("two", 2, [(1, 2), (2, 1)]), pytest.param("four", 4, [(2, 2)], marks=pytest.mark.full)],
)
def test_streams_and_dealt_clips_on_processes_equal_virtual_ranks(
    processes, oracles, task, world, grids
):
    by_rank = [results["streams"] for results in processes(task, world)]
    for number, (ring, ulysses) in enumerate(grids):
        runs, _ = run_virtual(oracles.exchanged, ring, ulysses)
        sum(loss for *_, loss in runs).backward()
        for rank, (leaf, results, _) in enumerate(runs):
            same_bits([by_rank[rank][number]], [{"gradient": leaf.grad, **results}])
