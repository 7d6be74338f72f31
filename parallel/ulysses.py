"""Turn "my frames, all heads" into "all frames, my heads" by one all-to-all, and back by another.

[B, T/P, S, H, D] -> [B, T·U/P, S, H/U, D] and back, U the Ulysses degree. Heads are split like
frames: contiguously, the first H % U ranks get one more. With fewer key heads than query heads
(GQA) each rank gets the key heads that its query heads read; a key head that several ranks read is
sent to each of them, and its gradients are summed in rank order on the way back.

Elements that a rank sends to rank j: forward B·(T/P)·S·D·(h_j + 2·g_j) and B·(T_j/P)·S·D·h, with
h_j and g_j the query and key heads of j; backward the same two in reverse. Two collectives forward,
two backward, whatever the number of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from parallel.comm import Exchange, Member, Program, pack, unpack
from parallel.layout import FrameRange, split_evenly
from parallel.ring import HeadSpans


def check_heads(heads: int, key_heads: int, degree: int) -> None:
    """Raise ValueError if the heads cannot be split over `degree` Ulysses ranks."""
    if heads % key_heads:
        raise ValueError(
            f"attend: got {heads} query heads and {key_heads} key heads, expected a whole number of"
            " query heads per key head"
        )
    if degree > heads:
        even = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"attend: got Ulysses degree {degree} for {heads} heads, expected at most one rank"
            f" per head (key parallel.ulysses). Fix: one of {even} (even), or any degree up to"
            f" {heads}; put the rest into parallel.ring"
        )


def key_heads_of(queries: FrameRange, group: int) -> FrameRange:
    """Return the key heads that a range of query heads reads, `group` of these per key head."""
    return (
        FrameRange(queries.start // group, -(-queries.stop // group))
        if len(queries)
        else FrameRange(0, 0)
    )


def head_spans(queries: FrameRange, group: int) -> HeadSpans:
    """Return for each of this rank's key heads the local query heads that read it."""
    keys = key_heads_of(queries, group)
    bounds = [
        (max(g * group, queries.start), min((g + 1) * group, queries.stop))
        for g in range(keys.start, keys.stop)
    ]
    return tuple((a - queries.start, b - queries.start) for a, b in bounds)


def _like(x: Tensor, frames: int, heads: int) -> Tensor:
    return torch.empty(
        x.shape[0], frames, x.shape[2], heads, x.shape[4], dtype=x.dtype, device="meta"
    )


def to_heads(
    member: Member,
    frames: Sequence[int],
    tensors: Sequence[Tensor],
    heads: Sequence[Sequence[FrameRange]],
) -> Program:
    """Exchange frames for heads: [B, T/P, S, H_i, D] -> [B, Σ frames, S, my heads, D].

    frames: frame count of each Ulysses rank; heads[i][j]: heads of tensor i for rank j.
    """
    if member.ulysses == 1:
        return list(tensors)
    me = member.ulysses_index
    parts = [
        pack([x[:, :, :, r[j].start : r[j].stop] for x, r in zip(tensors, heads)])
        for j in range(member.ulysses)
    ]
    like = [[_like(x, n, len(r[me])) for x, r in zip(tensors, heads)] for n in frames]
    answers = yield Exchange(parts, like, "ulysses")
    blocks = [unpack(flat, shapes) for flat, shapes in zip(answers, like)]
    return [torch.cat(column, 1) for column in zip(*blocks)]


def to_frames(
    member: Member,
    frames: Sequence[int],
    tensors: Sequence[Tensor],
    heads: Sequence[Sequence[FrameRange]],
) -> Program:
    """Exchange heads for frames: [B, Σ frames, S, my heads, D] -> [B, T/P, S, H_i, D].

    This is the adjoint of `to_heads`; heads that several ranks hold are summed in rank order.
    """
    if member.ulysses == 1:
        return list(tensors)
    me = member.ulysses_index
    parts = [pack(list(group)) for group in zip(*(x.split(list(frames), 1) for x in tensors))]
    like = [
        [_like(x, frames[me], len(r[i])) for x, r in zip(tensors, heads)]
        for i in range(member.ulysses)
    ]
    answers = yield Exchange(parts, like, "ulysses")
    blocks = [unpack(flat, shapes) for flat, shapes in zip(answers, like)]
    return [_join([block[i] for block in blocks], ranges) for i, ranges in enumerate(heads)]


def _join(pieces: list[Tensor], ranges: Sequence[FrameRange]) -> Tensor:
    """Concatenate pieces [B, n, S, len(range), D] along the heads; overlapping heads are summed."""
    if all(a.stop == b.start for a, b in pairwise(ranges)):
        return torch.cat(pieces, 3)
    first = pieces[0]
    out = first.new_zeros(*first.shape[:3], max(r.stop for r in ranges), first.shape[4])
    for piece, r in zip(pieces, ranges):
        out[:, :, :, r.start : r.stop] += piece
    return out


def deal_heads(
    heads: int, key_heads: int, degree: int
) -> tuple[tuple[FrameRange, ...], tuple[FrameRange, ...]]:
    """Return the query heads and the key heads of each Ulysses rank."""
    check_heads(heads, key_heads, degree)
    queries = split_evenly(heads, degree)
    return queries, tuple(key_heads_of(r, heads // key_heads) for r in queries)
