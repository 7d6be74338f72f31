"""Fetch exactly the keys and values that the mask lets a rank see; queries and outputs stay.

Rank p holds frames [a, b) and fetches, from the ranks that hold them, all other frames that some
frame of its own sees. `masks.visible` decides that, so integers alone: any mask, documents,
padding, copies, any T and P. There is one exchange forward (k and v) and one backward (their
gradients, home again), and none where no rank needs anything. The forward one travels while a rank
attends to its own frames, the backward one while it computes their gradients.

Elements sent by rank p, with need(q) the frames that rank q fetches: forward
2·B·S·H_kv·D · Σ_q |need(q) ∩ held(p)|, backward 2·B·S·H_kv·D · |need(p)|. With a window of w frames
and at least w − 1 frames on each rank these are w − 1 frames, whatever P, T and H are; Ulysses
sends B·S·D·(T/P)·(1 − 1/P)·(2·H + 2·H_kv) each way. Ranks have unequal work where frames late in a
clip see more than early ones.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.comm import Begin, Exchange, Finish, Member, Program, pack, unpack
from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import accumulation_dtype, merge
from parallel.masks import AttentionMask, Runs, Tile, cache_tiles, tiles, visible
from parallel.reference import Kernels


class Far(NamedTuple):
    """Store keys and values [B, n, S, H_kv, D] of frames that the queries' rank does not hold, and
    which frames of the clip they are, ascending."""

    keys: Tensor
    values: Tensor
    frames: tuple[int, ...]


class Fetch(NamedTuple):
    """Say what one rank exchanges: its own frames, the frames that it sends to each rank, and those
    that it receives from each."""

    held: FrameRange
    send: tuple[tuple[int, ...], ...]
    receive: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def held_frames(layout: ClipLayout, part: FrameRange, ranks: int) -> tuple[FrameRange, ...]:
    """Return the frames of the clip that each rank holds, where the ranks together hold `part`."""
    return tuple(
        FrameRange(part.start + r.start, part.start + r.stop) for r in layout.cut(part).split(ranks)
    )


@lru_cache(maxsize=1024)
def needed_frames(
    layout: ClipLayout, mask: AttentionMask, part: FrameRange, ranks: int
) -> tuple[tuple[int, ...], ...]:
    """Return for each rank the frames of `part` that its own frames see and other ranks hold."""
    real = layout.frames if layout.valid_frames is None else max(layout.valid_frames, default=0)
    found = []
    for own in held_frames(layout, part, ranks):
        seen: set[int] = set()
        for frame in range(own.start, min(own.stop, real)):
            seen |= visible(layout, mask, frame)
        others = (j for j in seen if not own.start <= j < own.stop)
        found.append(tuple(sorted(j for j in others if part.start <= j < min(part.stop, real))))
    return tuple(found)


@lru_cache(maxsize=1024)
def plan_fetch(
    layout: ClipLayout, mask: AttentionMask, part: FrameRange, ranks: int, index: int
) -> Fetch | None:
    """Return what rank `index` exchanges; None where no rank needs a frame of another."""
    held, needs = held_frames(layout, part, ranks), needed_frames(layout, mask, part, ranks)
    if not any(needs):
        return None
    return Fetch(
        held[index],
        tuple(_inside(frames, held[index]) for frames in needs),
        tuple(_inside(needs[index], r) for r in held),
    )


def _inside(frames: tuple[int, ...], r: FrameRange) -> tuple[int, ...]:
    return tuple(j for j in frames if r.start <= j < r.stop)


def forward(
    member: Member,
    layout: ClipLayout,
    mask: AttentionMask,
    kernels: Kernels,
    part: FrameRange,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Far | None = None,
) -> Program:
    """Compute attention of this rank's queries over all keys and values of the clip's `part`.

    q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D] are those of this rank's frames; past: those of
    earlier frames, the same on all ranks. Returns out (dtype of q), LSE [B, T/P, S, H], and what
    this rank did not hold: past, then the fetched frames.
    """
    fetch = plan_fetch(layout, mask, part, member.size, member.index)
    mine = held_frames(layout, part, member.size)[member.index]
    begun = None
    if fetch is not None:
        # [B, frames for q, S, H_kv, D] of k and v, flat -> [B, frames from q, S, H_kv, D], flat
        parts = [pack([_take(x, frames, mine.start) for x in (k, v)]) for frames in fetch.send]
        like = [[_like(x, len(frames)) for x in (k, v)] for frames in fetch.receive]
        begun = yield Begin(Exchange(parts, like))
    out, lse = kernels.block_attention(q, k, v, tiles(layout, mask, mine, mine))
    far = past
    if fetch is not None:
        answers = yield Finish(begun)
        fetched = [unpack(flat, shapes) for flat, shapes in zip(answers, like, strict=True)]
        far = _joined(past, fetched, fetch)
    rows, pieces = (None, ()) if far is None else _rows_and_tiles(layout, mask, mine, far.frames)
    if far is not None and rows is not None:
        near = slice(rows.start - mine.start, rows.stop - mine.start)
        found = kernels.block_attention(q[:, near], far.keys, far.values, pieces)
        wide = accumulation_dtype(q.dtype)
        both = merge(out[:, near].to(wide), lse[:, near], found[0].to(wide), found[1])
        # not in place: selective checkpointing keeps what a kernel returned for the second run
        out = torch.cat([out[:, : near.start], both[0].to(out.dtype), out[:, near.stop :]], 1)
        lse = torch.cat([lse[:, : near.start], both[1], lse[:, near.stop :]], 1)
    return out, lse, far


def backward(
    member: Member,
    layout: ClipLayout,
    mask: AttentionMask,
    kernels: Kernels,
    part: FrameRange,
    grad: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    far: Far | None = None,
) -> Program:
    """Return the gradients of q, k, v, given that of out, in their dtypes.

    kept = q, k, v, out, LSE: inputs and results of `forward`; far: what it returned last.
    """
    q, k, v, out, lse = kept
    fetch = plan_fetch(layout, mask, part, member.size, member.index)
    mine, wide = held_frames(layout, part, member.size)[member.index], accumulation_dtype(q.dtype)
    rows, pieces = (None, ()) if far is None else _rows_and_tiles(layout, mask, mine, far.frames)
    begun, dq_far = None, None
    if far is not None:
        gradients = [torch.zeros_like(x) for x in far[:2]]
        if rows is not None:
            near = slice(rows.start - mine.start, rows.stop - mine.start)
            dq_far, *gradients = kernels.block_attention_backward(
                grad[:, near], q[:, near], far.keys, far.values, out[:, near], lse[:, near], pieces
            )
        if fetch is not None:
            counts = [len(frames) for frames in fetch.receive]
            fetched = slice(len(far.frames) - sum(counts), None)  # the past has no gradient
            split = [x[:, fetched].to(k.dtype).split(counts, 1) for x in gradients]
            # [B, frames from q, S, H_kv, D] of dk and dv, flat -> those of the frames sent to q
            parts = [pack(list(pair)) for pair in zip(*split, strict=True)]
            like = [[_like(x, len(frames)) for x in (k, v)] for frames in fetch.send]
            begun = yield Begin(Exchange(parts, like))
    own = tiles(layout, mask, mine, mine)
    dq, dk, dv = kernels.block_attention_backward(grad, q, k, v, out, lse, own)
    if rows is not None and dq_far is not None:
        dq = dq.to(wide)
        dq[:, rows.start - mine.start : rows.stop - mine.start] += dq_far
    if fetch is not None:
        answers = yield Finish(begun)
        dk, dv = dk.to(wide), dv.to(wide)
        for flat, shapes, frames in zip(answers, like, fetch.send, strict=True):  # in rank order
            for total, piece in zip((dk, dv), unpack(flat, shapes), strict=True):
                _add(total, piece, frames, mine.start)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _rows_and_tiles(
    layout: ClipLayout, mask: AttentionMask, mine: FrameRange, far: tuple[int, ...]
) -> tuple[FrameRange | None, tuple[Tile, ...]]:
    """Return from which to which of a rank's frames some see frames that it does not hold, and the
    tiles of these; None where none does."""
    found = cache_tiles(layout, mask, mine, far)
    if not found:
        return None, ()
    first = min(tile.queries[0] for tile in found)
    stop = max(tile.queries[1] for tile in found)
    rows = FrameRange(mine.start + first, mine.start + stop)
    return rows, cache_tiles(layout, mask, rows, far)


def _joined(past: Far | None, fetched: list[list[Tensor]], fetch: Fetch) -> Far:
    """Return past frames and those of each rank, in this order: both ascend."""
    pieces = [*([list(past[:2])] if past else []), *fetched]
    keys, values = (torch.cat(column, 1) for column in zip(*pieces, strict=True))
    return Far(keys, values, (past.frames if past else ()) + sum(fetch.receive, ()))


def _take(x: Tensor, frames: tuple[int, ...], first: int) -> Tensor:
    """Return these frames of x [B, T/P, …], which starts at frame `first` of the clip; of one run
    a view."""
    pieces = [x[:, start:stop] for start, stop in _runs(frames, first)]
    return x[:, :0] if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _add(total: Tensor, piece: Tensor, frames: tuple[int, ...], first: int) -> None:
    """Add `piece`, one entry for each of these frames, to those of `total`, which starts at frame
    `first` of the clip."""
    cursor = 0
    for start, stop in _runs(frames, first):
        total[:, start:stop] += piece[:, cursor : cursor + stop - start]
        cursor += stop - start


@lru_cache(maxsize=4096)
def _runs(frames: tuple[int, ...], first: int) -> Runs:
    """Return the runs of successive frames as places counted from frame `first`."""
    runs = [list(run) for _, run in groupby(enumerate(frames), lambda pair: pair[1] - pair[0])]
    return tuple((run[0][1] - first, run[-1][1] + 1 - first) for run in runs)


def _like(x: Tensor, frames: int) -> Tensor:
    """Return a meta tensor with the shape and dtype of `frames` frames of x."""
    return torch.empty(x.shape[0], frames, *x.shape[2:], dtype=x.dtype, device="meta")
