"""Virtual ranks: they fail loudly, they inherit the caller's modes, and they count what they
send."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as plain_checkpoint

from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence
from parallel.virtual import replicate, run_virtual

LAYOUT = ClipLayout(5)


def test_an_error_in_one_member_ends_all():
    def body(comm):
        if comm.members[0].index == 1:
            raise KeyError("broken")
        return GroupSequence(LAYOUT, comm).mean(torch.ones(1, 2), torch.ones(1, 2))

    with pytest.raises(KeyError, match="broken"):
        run_virtual(body, ulysses=3)


def test_members_that_call_different_verbs_are_told():
    def body(comm):
        sequence = GroupSequence(LAYOUT, comm)
        x = torch.ones(1, len(sequence.frames), 1)
        return sequence.halo([x], 1 + comm.members[0].index, 0)

    with pytest.raises(ValueError, match="disagree on the verb"):
        run_virtual(body, ulysses=2)


def test_a_member_that_leaves_early_is_told():
    def body(comm):
        sequence = GroupSequence(LAYOUT, comm)
        if comm.members[0].index == 0:
            return sequence.mean(torch.ones(1, 3), torch.ones(1, 3))
        return None

    with pytest.raises(RuntimeError, match="all ranks must call the same verbs"):
        run_virtual(body, ulysses=2)


def test_autocast_grad_mode_and_default_dtype_hold_in_every_thread():
    def body(comm):
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
        )

    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            found, _ = run_virtual(body, ulysses=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [(False, True, torch.float16, torch.float64)] * 2
    assert run_virtual(body, ulysses=2)[0] == [(True, False, torch.bfloat16, torch.float32)] * 2


def toy(sequence, layer, x):
    """A convolution over time, an activation and attention: everything that checkpointing has to
    get right."""
    (taps,) = sequence.halo([layer(x)], 1, 1)
    mixed = torch.stack(list(taps)).sum(0).sin()
    out = sequence.attend(mixed[:, :, :, None], mixed[:, :, :, None], mixed[:, :, :, None])
    return out[:, :, :, 0] + x


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (3, 1)])
def test_checkpointing_gives_the_same_bits_and_no_further_collectives(grid):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)

    def run(wrapped):
        layers = replicate(layer, grid[0] * grid[1])

        def body(comm):
            sequence = GroupSequence(LAYOUT, comm)
            own = layers[comm.members[0].index]
            h = x[:, sequence.frames.start : sequence.frames.stop]
            for _ in range(2):
                h = (
                    checkpoint(lambda h: toy(sequence, own, h), h, sequence=sequence)
                    if wrapped
                    else toy(sequence, own, h)
                )
            return sequence.mean(h.square(), torch.ones(2, len(sequence.frames)))

        losses, traffic = run_virtual(body, *grid)
        for _ in range(2):  # twice over the same graph: gradients accumulate
            sum(loss.sum() for loss in losses).backward(retain_graph=True)
        return losses, [m.weight.grad for m in layers], traffic

    plain, again = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0]))
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1]))
    assert [t.collectives for t in plain[2]] == [t.collectives for t in again[2]]


def test_plain_checkpointing_is_refused_with_the_remedy():
    def body(comm):
        sequence = GroupSequence(LAYOUT, comm)
        x = torch.ones(1, len(sequence.frames), 1, requires_grad=True)
        out = plain_checkpoint(
            lambda x: sequence.halo([x.sin()], 1, 0)[0][0].sin(), x, use_reentrant=False
        )
        return out.sum()

    losses, _ = run_virtual(body, ulysses=2)
    with pytest.raises(RuntimeError, match=r"parallel\.checkpointing\.checkpoint"):
        sum(losses).backward()


def test_replicas_share_memory_and_have_gradients_of_their_own():
    layer = nn.Linear(3, 3)
    first, second = replicate(layer, 2)
    assert first.weight.data_ptr() == layer.weight.data_ptr()
    first(torch.ones(1, 3)).sum().backward()
    assert first.weight.grad is not None
    assert second.weight.grad is None
    assert layer.weight.grad is None
