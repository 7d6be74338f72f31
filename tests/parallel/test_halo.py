"""halo: every width on any mesh, halos longer than a member's share included."""

from __future__ import annotations

import pytest
import torch

MEMBERS = (1, 2, 3, 4, 8)
FRAMES = (1, 2, 5, 11, 61, 121)
SIDES = ((1, 0), (0, 1), (1, 1), (3, 0), (2, 1), (3, 3), (4, 0), (0, 4), (4, 4))


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("members", MEMBERS)
def test_halo_equals_indexing(oracles, members, frames):
    kinds = list(oracles.layouts(frames))
    for n, (before, after) in enumerate(SIDES):
        edges = ("clip", "document", "chunk")[(n + members + frames) % 3]
        layout = oracles.layouts(frames)[kinds[(n + members) % len(kinds)]]
        case = oracles.Case(
            layout, ("halo",), before=before, after=after, halo_edges=edges, tokens=1
        )
        errors = oracles.worst(
            oracles.joined(oracles.virtual_run(case, 1, members)[0]), oracles.serial_run(case)
        )
        assert max(errors) <= 1e-12, (case, errors)


def test_several_tensors_go_in_one_exchange_of_exactly_the_needed_frames(oracles):
    """x is [B, t, 2, 3] and y [B, t, 5] in float64: 11 numbers a row and frame. 121 frames over 4
    members: 31, 30, 30, 30."""
    case = oracles.Case(oracles.ClipLayout(121), ("halo",), before=3, after=2)
    _, traffic = oracles.virtual_run(case, 1, 4)
    frame = 11 * 8 * case.batch
    assert [t.collectives for t in traffic] == [{"halo forward": 1, "halo backward": 1}] * 4
    # a member sends 3 frames to the right and 2 to the left, the first and last to one side only;
    # backward the received ones return
    assert [t.sent["halo forward"] for t in traffic] == [3 * frame, 5 * frame, 5 * frame, 2 * frame]
    assert [t.sent["halo backward"] for t in traffic] == [
        2 * frame,
        5 * frame,
        5 * frame,
        3 * frame,
    ]


def test_taps_are_views_where_nothing_is_cut():
    from parallel.layout import ClipLayout
    from parallel.sequence import LocalSequence

    (taps,) = LocalSequence(ClipLayout(6)).halo([torch.randn(1, 6, 4)], 2, 1)
    assert len({tap.untyped_storage().data_ptr() for tap in taps}) == 1


def test_dtypes_may_differ_between_the_tensors(oracles):
    from parallel.layout import ClipLayout
    from parallel.sequence import GroupSequence, LocalSequence
    from parallel.virtual import run_virtual

    layout = ClipLayout(7)
    tensors = [
        torch.randn(1, 7, 3).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)
    ]

    def body(comm):
        sequence = GroupSequence(layout, comm)
        return sequence.halo(
            [x[:, sequence.frames.start : sequence.frames.stop] for x in tensors], 3, 1
        )

    members, _ = run_virtual(body, ulysses=3)
    whole = LocalSequence(layout).halo(tensors, 3, 1)
    for i in range(3):
        for j in range(5):
            assert torch.equal(torch.cat([member[i][j] for member in members], 1), whole[i][j])


def test_unknown_edges_are_refused():
    from parallel.layout import ClipLayout
    from parallel.sequence import LocalSequence

    with pytest.raises(ValueError, match="expected clip, document or chunk"):
        LocalSequence(ClipLayout(2)).halo([torch.randn(1, 2, 1)], 1, 0, edges="frame")
