"""Clean and noisy copies of a frame in one layout: who sees whom, on every mesh, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout, FrameRange
from parallel.masks import CHUNK_CAUSAL, FULL, AttentionMask, tiles, visible
from parallel.reference import Stream
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState

EACH = tuple(range(9))  # chunks of one frame
LAYOUTS = {
    "frame by frame": ClipLayout(9, chunk_starts=EACH),
    "documents": ClipLayout(9, (0, 4), EACH),
    "chunks of two": ClipLayout(9, chunk_starts=(0, 2, 4, 6, 8)),
    "ragged": ClipLayout(9, (0, 5), EACH, (9, 7)),
    "one chunk": ClipLayout(9),
}
MASKS = {
    "local": AttentionMask("frame", window=3),
    "global": AttentionMask("frame", window=1, dilation=2, reach=6),
    "both": AttentionMask("frame", window=2, sink=1, dilation=3, reach=7),
    "chunk": CHUNK_CAUSAL,
    "chunk window": AttentionMask("chunk", window=2, sink=1),
    "full": FULL,
}
GRIDS = [(1, 1), (1, 2), (2, 1), (3, 1), (1, 4), (2, 2), (8, 1)]


def cases():
    for layout in LAYOUTS.values():
        for mask in MASKS.values():
            yield layout, mask


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("given", [False, True])
def test_copies_see_what_the_public_rule_says(oracles, copies, given):
    for once, mask in cases():
        layout = once.copied(copies, given)
        for i in range(layout.frames):
            expected = {j for j in range(layout.frames) if oracles.may_attend(layout, mask, i, j)}
            assert visible(layout, mask, i) == expected, (layout, mask, i)


def test_a_noisy_frame_sees_the_clean_past_and_itself_and_no_copy_of_it():
    layout, mask = LAYOUTS["frame by frame"].copied(3), MASKS["local"]
    assert visible(layout, mask, 3 * 5 + 2) == {9, 12, 17}  # clean frames 3 and 4, its own copy 2
    assert visible(layout, mask, 3 * 5) == {9, 12, 15}  # clean sees clean


def test_tiles_of_a_frames_copies_are_shared_and_own_frames_are_one_call():
    """Both copies of a frame are queries of one tile over the clean past: S·2 queries a product."""
    layout = ClipLayout(9, chunk_starts=EACH).copied(2)
    whole = FrameRange(0, 18)
    found = tiles(layout, MASKS["local"], whole, whole)
    assert [t.queries for t in found if not t.diagonal] == [(2 * i, 2 * i + 2) for i in range(1, 9)]
    assert [t.queries for t in found if t.diagonal] == [(0, 18)]


def test_the_split_keeps_copies_of_a_frame_together():
    layout = LAYOUTS["frame by frame"].copied(2)
    assert layout.split(4) == (
        FrameRange(0, 6),
        FrameRange(6, 10),
        FrameRange(10, 14),
        FrameRange(14, 18),
    )
    part = GroupSequence(layout, LocalSequence(layout).comm, part=FrameRange(4, 10))
    assert part.positions.tolist() == [[2, 2, 3, 3, 4, 4]]
    documents = LAYOUTS["documents"].copied(2)
    assert [documents.position_of(i) for i in (6, 7, 8, 9, 10)] == [3, 3, 0, 0, 1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_attention_over_copies_equals_dense_attention(oracles, grid):
    """Values and gradients, grouped queries; on eight ranks some have a single frame."""
    wanted = [(LAYOUTS["ragged"], MASKS["both"]), (LAYOUTS["chunks of two"], MASKS["global"])]
    if grid == (2, 1):
        wanted += [(LAYOUTS["documents"], mask) for mask in MASKS.values()]
    for once, mask in wanted:
        layout = once.copied(2, clean_given=grid == (2, 2))
        case = oracles.Case(layout, ("attend",), mask=mask, key_heads=2)
        found = oracles.joined(oracles.virtual_run(case, *grid)[0])
        assert max(oracles.worst(found, oracles.serial_run(case))) <= 1e-11, (layout, mask)


@pytest.mark.parametrize("mask", ["local", "both", "chunk window"])
def test_perturbing_a_copy_changes_to_the_bit_only_what_sees_it(oracles, mask):
    for name, grid in (
        ("frame by frame", (1, 1)),
        ("documents", (3, 1)),
        ("chunks of two", (1, 2)),
    ):
        layout = LAYOUTS[name].copied(2)
        case = oracles.Case(layout, ("attend",), mask=MASKS[mask], tokens=1)
        base, _ = oracles.joined(oracles.virtual_run(case, *grid)[0])
        for j in (0, 6, 7, 11, 17):
            moved = replace(case, perturbed=(0, j))
            after, _ = oracles.joined(oracles.virtual_run(moved, *grid)[0])
            changed = (base["out"] != after["out"]).flatten(2).any(2)
            assert not changed[1].any()
            for i in range(layout.frames):
                if i != j:  # its own query changed as well
                    sees = oracles.may_attend(layout, MASKS[mask], i, j)
                    assert bool(changed[0, i]) == sees, (name, i, j)


def test_what_orders_copies_in_time_refuses_them():
    layout = ClipLayout(3, chunk_starts=(0, 1, 2)).copied(2)
    sequence, x = LocalSequence(layout), torch.randn(1, 6, 2)
    stream = Stream(torch.ones(1, 6, 1), torch.zeros(1, 6, 1, 2, 2), torch.zeros(1, 6, 1, 2, 2))
    for run in (
        lambda: sequence.scan([stream]),
        lambda: sequence.halo([x], 1, 1),
        lambda: StreamingSequence(sequence, StreamState()),
    ):
        with pytest.raises(ValueError, match="2 copies of each frame, expected single"):
            run()


@pytest.mark.parametrize(
    "arguments",
    [
        {"frames": 4, "copies": 0},
        {"frames": 5, "copies": 2},
        {"frames": 4, "copies": 2, "document_starts": (0, 1)},
        {"frames": 4, "copies": 2, "valid_frames": (3,)},
    ],
)
def test_counts_that_cut_a_frame_are_refused(arguments):
    with pytest.raises(ValueError, match=r"got copies=.*expected"):
        ClipLayout(**arguments)
    with pytest.raises(ValueError, match="cannot copy frames"):
        ClipLayout(2).copied(2).copied(2)
