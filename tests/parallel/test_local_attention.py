"""The attention of one block: grouped heads and dilated masks without copies, and their tiles."""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch

from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import (
    block_attention,
    block_attention_backward,
    dense_attention,
    key_blocks,
)
from parallel.masks import AttentionMask, cache_tiles, needed, tiles, visible
from parallel.reference import REFERENCE
from parallel.sequence import LocalSequence

LOCAL = AttentionMask("frame", window=16)  # Waypoint's two kinds of blocks
GLOBAL = AttentionMask("frame", window=1, dilation=8, reach=128)
UNION = AttentionMask("frame", window=3, dilation=2, reach=9, sink=1)
SMALL = AttentionMask("frame", window=1, dilation=3, reach=8)
LAYOUTS = {
    "plain": ClipLayout(11),
    "documents": ClipLayout(11, document_starts=(0, 4, 9)),
    "ragged": ClipLayout(11, valid_frames=(11, 6)),
}


def pairs_of(found) -> list[tuple[int, int]]:
    """All (query frame, key frame) of tiles, as often as they are computed."""
    pairs = []
    for tile in found:
        keys = [j for run in tile.keys for j in range(*run)]
        queries = list(range(*tile.queries))
        pairs += zip(queries, keys) if tile.diagonal else [(i, j) for i in queries for j in keys]
    return pairs


@pytest.mark.parametrize("mask", [LOCAL, GLOBAL, UNION, SMALL, AttentionMask("frame", window=1)])
@pytest.mark.parametrize("block", [(0, 150), (40, 80), (100, 150)])
def test_tiles_hold_every_visible_pair_once(mask, block):
    layout = ClipLayout(150, document_starts=(0, 13, 140))
    queries, keys = FrameRange(60, 150), FrameRange(*block)
    found = pairs_of(tiles(layout, mask, queries, keys))
    expected = [
        (i - queries.start, j - keys.start)
        for i in range(queries.start, queries.stop)
        for j in visible(layout, mask, i)
        if keys.start <= j < keys.stop
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("mask", [LOCAL, GLOBAL, UNION, SMALL, AttentionMask("frame", window=1)])
@pytest.mark.parametrize("kept", ["needed", "gaps", "gaps, documents"])
def test_tiles_of_cached_frames_hold_every_visible_pair_once(mask, kept):
    """Of the frames that a stream keeps, and of frames with gaps, some of them the queries' own."""
    layout, first = ClipLayout(150), 60
    if kept == "needed":
        cached = tuple(sorted(needed(layout, mask, first)))
    else:
        cached = tuple(j for j in range(150) if j % 5 not in (1, 3))
    if kept == "gaps, documents":
        layout = ClipLayout(150, document_starts=(0, 13, 140))
    found = pairs_of(cache_tiles(layout, mask, FrameRange(first, 150), cached))
    expected = [
        (i - first, cached.index(j))
        for i in range(first, 150)
        for j in visible(layout, mask, i)
        if j in cached
    ]
    assert sorted(found) == sorted(expected)


def test_a_dilated_block_is_few_tiles_and_its_frames_are_copied_once():
    """192 frames: all own frames in one call, and two sets of pinned frames for every eight
    queries; of 192 key frames 24 are copied, where a tile per query would copy 3,000."""
    whole = FrameRange(0, 192)
    found = tiles(ClipLayout(192), GLOBAL, whole, whole)
    assert sum(tile.diagonal for tile in found) == 1
    assert len(found) <= 1 + 48
    (own, none), (far, frames) = key_blocks(found)
    assert none is None
    assert frames == tuple(range(0, 192, 8))
    assert all(len(tile.keys) == 1 for tile in (*own, *far))
    assert len(pairs_of(found)) == 2280
    local = tiles(ClipLayout(192), LOCAL, whole, whole)
    assert len(pairs_of(local)) == 2952
    assert key_blocks(local) == [(local, None)]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("mask", [UNION, SMALL], ids=["union", "own and dilated"])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (4, 1)])
def test_grouped_heads_under_dilated_masks_equal_dense_attention(oracles, kind, mask, heads):
    """Forward and gradients in fp64, on one device and in a ring of three."""
    layout = LAYOUTS[kind]
    sizes = {"heads": heads[0], "key_heads": heads[1], "mask": mask}
    case = oracles.Case(layout, ("attend",), **sizes)
    for grid in ((1, 1), (3, 1)):
        found = oracles.joined(oracles.virtual_run(case, *grid)[0])
        assert max(oracles.worst(found, oracles.serial_run(case))) <= 1e-11


@pytest.mark.parametrize("mask", [LOCAL, SMALL])
def test_kernels_get_key_heads_as_they_are(mask):
    """No tile has more key heads than the model: query heads come as more queries of theirs."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    def spy(q, k, v):
        seen.append((q.shape, k.shape))
        return dense_attention(q, k, v)

    kernels = REFERENCE._replace(block_attention=partial(block_attention, dense=spy))
    q = torch.randn(1, 6, 3, 8, 4, dtype=torch.float64)
    k = torch.randn(1, 6, 3, 2, 4, dtype=torch.float64)
    LocalSequence(ClipLayout(6), kernels).attend(q, k, k, mask)
    assert {shape[1] for shape, _ in seen} == {shape[1] for _, shape in seen} == {2}
    assert sum(prod(shape[:3]) for shape, _ in seen) >= 6 * 3 * 8


def test_two_parts_of_a_softmax_merge_in_half_precision():
    """bf16: LSE and weights are fp32, so the error stays that of the parts' rounding."""
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, 24, 4, 4, 16, generator=g, dtype=torch.float64) for _ in range(4)]
    low = [x.bfloat16() for x in exact]
    found = tiles(ClipLayout(24), SMALL, FrameRange(0, 24), FrameRange(0, 24))
    out, lse = block_attention(*low[:3], found)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    wide = block_attention(*(x.double() for x in low[:3]), found)
    assert float((out.double() - wide[0]).norm() / wide[0].norm()) < 4e-3
    grads = block_attention_backward(low[3], *low[:3], out, lse, found)
    expected = block_attention_backward(
        low[3].double(), *(x.double() for x in low[:3]), *wide, found
    )
    for grad, e in zip(grads, expected):
        assert float((grad.double() - e).norm() / e.norm()) < 2e-2
