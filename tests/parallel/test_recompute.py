"""Compare what may become of collectives in a block that is computed again, on processes: results
to the bit, and the bytes that each choice holds until backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence

WORKER = Path(__file__).with_name("recompute_worker.py")
MODES = ("none", "answers", "keep_attention", "collectives")
# units of [B, T/P, S, H, D] that the record holds: ring x ulysses -> by mode, above what a block
# that is computed again holds anyway (its input), which is all that `collectives` leaves
HELD = {
    (1, 2): {"answers": 4, "keep_attention": 5, "collectives": 0},
    (2, 1): {"answers": 2, "keep_attention": 1, "collectives": 0},
    (2, 2): {"answers": 6, "keep_attention": 5, "collectives": 0},
    (4, 1): {"answers": 6, "keep_attention": 1, "collectives": 0},
    (1, 4): {"answers": 4, "keep_attention": 5, "collectives": 0},
}


def run(folder: Path, ring: int, ulysses: int) -> list[dict]:
    world = ring * ulysses
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, (rank, ring, ulysses, folder))],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize(
    ("ring", "ulysses"),
    [mesh if mesh == (1, 2) else pytest.param(*mesh, marks=pytest.mark.full) for mesh in HELD],
)
def test_every_way_gives_the_same_bits_and_holds_what_it_says(tmp_path, ring, ulysses):
    for found in run(tmp_path, ring, ulysses):
        base = found["none"]
        for mode in MODES[1:]:
            for name, value in base["results"].items():
                assert torch.equal(found[mode]["results"][name], value), (mode, name)
        for mode, units in HELD[ring, ulysses].items():
            own = found[mode]["held"] - found[mode]["log_sum_exp"] - found["collectives"]["held"]
            assert own == units * found["unit"], (mode, own / found["unit"])
        away = found["collectives+host"]
        for mode in MODES[1:]:  # what is kept goes where hooks on saved tensors move it
            moved = found[f"{mode}+host"]
            assert moved["held"] == away["held"] <= found["collectives"]["held"]
            for name, value in base["results"].items():
                assert torch.equal(moved["results"][name], value), (mode, name)
        sent = {mode: found[mode]["sent"] for mode in MODES}
        assert sent["answers"] == sent["keep_attention"] == sent["none"]
        assert sent["collectives"] > sent["none"]  # the forward's traffic twice


@pytest.mark.parametrize("mode", MODES[1:])
def test_on_one_device_attention_is_computed_as_often_as_promised(mode):
    counted = []

    sequence = LocalSequence(ClipLayout(3))
    sequence.recompute = mode
    inner = sequence.kernels.block_attention

    def count(*given):
        counted.append(1)
        return inner(*given)

    sequence.kernels = sequence.kernels._replace(block_attention=count)
    x = torch.randn(1, 3, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    checkpoint(lambda y: sequence.attend(y, y, y).sin(), x, sequence=sequence).sum().backward()
    assert len(counted) == (1 if mode == "keep_attention" else 2)
    again = x.detach().requires_grad_()
    LocalSequence(ClipLayout(3)).attend(again, again, again).sin().sum().backward()
    assert torch.equal(again.grad, x.grad)


def test_two_records_of_attention_are_refused():
    sequence = LocalSequence(ClipLayout(1))
    sequence.recompute = "keep_attention"
    with pytest.raises(ValueError, match="keep_products with keep_attention"):
        checkpoint(torch.sin, torch.ones(1), sequence=sequence, keep_products=True)
