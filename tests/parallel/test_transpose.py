"""Rollouts dealt over ranks by clips: clips turn into frames for the score networks, and back."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.traffic import expected_cost
from parallel.transpose import share_of, to_clips, to_frames
from parallel.virtual import run_virtual

T, SHAPE = 7, (2, 3)


def clips(count: int) -> torch.Tensor:
    return torch.arange(count * T * 6, dtype=torch.float64).reshape(count, T, *SHAPE)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("each", [1, 2])
def test_clips_become_frames_of_all_clips_and_return(ring, ulysses, each):
    """Seven frames on two, three and four ranks, one and two clips a rank."""
    size = ring * ulysses
    whole = clips(size * each)

    def body(comm):
        sequence = GroupSequence(ClipLayout(T), comm)
        share = share_of(sequence, len(whole))
        mine = whole[share.clips.start : share.clips.stop]
        local = to_frames(sequence, share, mine)
        return share, sequence.frames, local, to_clips(sequence, share, local)

    results, traffic = run_virtual(body, ring, ulysses)
    assert [i for share, *_ in results for i in share.clips] == list(range(size * each))
    for share, frames, local, back in results:
        assert (share.turn, share.of, share.replicated) == (0, 1, False)
        assert torch.equal(local, whole[:, frames.start : frames.stop])
        assert torch.equal(back, whole[share.clips.start : share.clips.stop])
    for index, (_, frames, *_) in enumerate(results):
        frame = each * 6 * 8  # bytes of one frame of a rank's clips
        collectives, sent = traffic[index].collectives, traffic[index].sent
        assert sum(collectives.values()) == (2 if size > 1 else 0)
        away = T - len(frames)  # forth: the frames of others; back: own frames of other clips
        assert sum(sent.values()) == (away + len(frames) * (size - 1)) * frame


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("back", [False, True])
def test_the_gradient_of_an_exchange_is_the_exchange_back(ring, ulysses, back):
    """Weights of outputs are gradients of inputs, at the same frame of the same clip."""
    size = ring * ulysses
    whole, weights = clips(size), clips(size).flip(0) + 1
    leaf = whole.clone().requires_grad_()

    def body(comm):
        sequence = GroupSequence(ClipLayout(T), comm)
        share = share_of(sequence, size)
        frames = slice(sequence.frames.start, sequence.frames.stop)
        own = slice(share.clips.start, share.clips.stop)
        if back:
            return (to_clips(sequence, share, leaf[:, frames]) * weights[own]).sum()
        return (to_frames(sequence, share, leaf[own]) * weights[:, frames]).sum()

    calls = {}

    def counted(comm):
        loss = body(comm)
        calls[comm.members[0].index] = comm
        return loss

    results, traffic = run_virtual(counted, ring, ulysses)
    sum(results).backward()
    assert torch.equal(leaf.grad, weights)
    for index, comm in calls.items():
        (call,) = comm.calls
        for way, cost in expected_cost(call.verb, call.tensors, comm.members[0]).items():
            assert traffic[index].sent[f"transpose {way}"] == cost.sent
            assert traffic[index].collectives[f"transpose {way}"] == cost.collectives == 1


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 3), (2, 2)])
def test_clips_that_do_not_divide_by_the_ranks_are_replicated(ring, ulysses):
    """One clip: every rank has all of it, keeps its own frames, and gets all frames back."""
    size, whole = ring * ulysses, clips(1)

    def body(comm):
        sequence = GroupSequence(ClipLayout(T), comm)
        share = share_of(sequence, 1)
        local = to_frames(sequence, share, whole[share.clips.start : share.clips.stop])
        return share, sequence.frames, local, to_clips(sequence, share, local)

    results, _ = run_virtual(body, ring, ulysses)
    assert [(share.turn, share.of) for share, *_ in results] == [(i, size) for i in range(size)]
    for share, frames, local, back in results:
        assert share.replicated
        assert torch.equal(local, whole[:, frames.start : frames.stop])
        assert torch.equal(back, whole)


def test_more_ranks_than_frames():
    whole = clips(4)[:, :3]

    def body(comm):
        sequence = GroupSequence(ClipLayout(3), comm)
        share = share_of(sequence, 4)
        local = to_frames(sequence, share, whole[share.clips.start : share.clips.stop])
        return len(sequence.frames), local.shape[:2], to_clips(sequence, share, local)

    results, _ = run_virtual(body, 4, 1)
    assert [shape for _, shape, _ in results] == [(4, 1), (4, 1), (4, 1), (4, 0)]
    assert torch.equal(torch.cat([back for *_, back in results]), whole)


def test_one_device_exchanges_nothing():
    sequence, whole = LocalSequence(ClipLayout(T)), clips(3)
    share = share_of(sequence, 3)
    assert to_frames(sequence, share, whole) is whole
    assert to_clips(sequence, share, whole) is whole
    assert (list(share.clips), share.replicated) == ([0, 1, 2], False)


@pytest.mark.parametrize("members", [2, 3, 4])
def test_gathered_frames_are_all_frames_and_gradients_are_summed(members):
    """Also of two tensors of other dtypes, with more ranks than frames."""
    layout = ClipLayout(3)
    leaf = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(members, 2, 3, 4, dtype=torch.float64)

    comms = []

    def body(comm):
        comms.append(comm)
        sequence = GroupSequence(layout, comm)
        local = slice(sequence.frames.start, sequence.frames.stop)
        whole, half = sequence.gather([leaf[:, local], leaf[:, local].float()])
        return whole, half, (whole * weights[comm.members[0].index]).sum()

    results, traffic = run_virtual(body, members)
    for whole, half, _ in results:
        assert torch.equal(whole, leaf)
        assert torch.equal(half, leaf.float())
    sum(loss for *_, loss in results).backward()
    assert (leaf.grad - weights.sum(0)).abs().max() <= 1e-15
    for comm, one in zip(sorted(comms, key=lambda comm: comm.members[0].index), traffic):
        (call,) = comm.calls
        for way, cost in expected_cost(call.verb, call.tensors, comm.members[0]).items():
            assert one.sent[f"gather {way}"] == cost.sent
            assert one.collectives[f"gather {way}"] == cost.collectives == 1
