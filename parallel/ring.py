"""Compute ring attention: key/value blocks move round the ring, queries stay, results are merged.

Rank r starts with the block of its own frames and after step s has the block of ring rank r − s.
Partial results merge by their log-sum-exp. out and LSE are accumulated in float32 (float64 for
float64 inputs): with half-precision accumulation the error would grow with the ring. Rows that see
nothing in a block arrive with LSE −inf and weigh nothing. Frames are contiguous, so under a causal
mask late ranks have more work than early ones: prefer Ulysses there.

Elements sent per rank, R > 1: forward R − 1 shifts of k and v; backward R − 1 shifts of k and v and
R of dk and dv (these in the accumulation dtype): every block carries its gradients along and is
back after R shifts. A shift starts before a block is computed and finishes after it, so the
computation hides it where communication runs in parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Begin, Exchange, Finish, Member, Program, pack, unpack
from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import accumulation_dtype, merge
from parallel.masks import AttentionMask, cache_tiles, tiles
from parallel.reference import Kernels

Cache = tuple[Tensor, Tensor, tuple[int, ...]]  # keys, values, their frames
HeadSpans = tuple[tuple[int, int], ...]


def repeat_heads(x: Tensor, spans: HeadSpans) -> Tensor:
    """Repeat key/value heads [B, n, S, H_kv, D] -> one per query head [B, n, S, H, D], where these
    are dealt unevenly.

    Span i: the query heads that read key head i. Where all spans are of one size, kernels take the
    heads as they are.
    """
    if _even(spans):
        return x
    index = torch.tensor(
        [i for i, (start, stop) in enumerate(spans) for _ in range(start, stop)], device=x.device
    )
    return x.index_select(3, index)


def sum_heads(x: Tensor, spans: HeadSpans) -> Tensor:
    """Sum gradients per key head, the adjoint of `repeat_heads`.

    The order of the sum is fixed and its dtype the accumulation dtype.
    """
    if _even(spans):
        return x
    return torch.stack(
        [x[:, :, :, start:stop].sum(3, dtype=accumulation_dtype(x.dtype)) for start, stop in spans],
        3,
    )


def _even(spans: HeadSpans) -> bool:
    """Return whether every key head is read by equally many query heads."""
    return len({stop - start for start, stop in spans}) <= 1


def _begin_shift(member: Member, tensors: Sequence[Tensor], incoming_frames: int) -> Program:
    """Start sending tensors [B, frames, …] to the next ring rank.

    Returns (ticket, meta tensors of what will arrive: `incoming_frames` frames of each).
    """
    after, before = (member.ring_index + 1) % member.ring, (member.ring_index - 1) % member.ring
    like = [
        torch.empty(x.shape[0], incoming_frames, *x.shape[2:], dtype=x.dtype, device="meta")
        for x in tensors
    ]
    packed = pack(tensors)
    parts = [packed if j == after else packed[:0] for j in range(member.ring)]
    ticket = yield Begin(
        Exchange(parts, [like if i == before else [] for i in range(member.ring)], "ring")
    )
    return ticket, like


def _finish_shift(member: Member, begun: tuple[Any, list[Tensor]]) -> Program:
    """Return the previous ring rank's tensors."""
    ticket, like = begun
    answers = yield Finish(ticket)
    return unpack(answers[(member.ring_index - 1) % member.ring], like)


def forward(
    member: Member,
    layout: ClipLayout,
    mask: AttentionMask,
    kernels: Kernels,
    ranges: tuple[FrameRange, ...],
    spans: HeadSpans,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache | None = None,
) -> Program:
    """Compute attention of this ring rank's queries over the keys and values of all ring ranks.

    q [B, n, S, h, D], k, v [B, n, S, h_kv, D] are those of this rank's frames. Returns out
    (accumulation dtype) and LSE [B, n, S, h]. ranges: the frames of each ring rank. cache: keys and
    values [B, c, S, h_kv, D] of more frames of the clip, and which these are.
    """
    # Earlier frames (streaming) are present on every rank, so they need no exchange.
    mine = ranges[member.ring_index]
    out: Tensor | None = None
    lse: Tensor | None = None
    if cache is not None:
        part = kernels.block_attention(
            q,
            *(repeat_heads(x, spans) for x in cache[:2]),
            cache_tiles(layout, mask, mine, cache[2]),
        )
        out, lse = part[0].to(accumulation_dtype(q.dtype)), part[1]
    # At step s this rank has the block of ring rank r − s; the next one travels meanwhile.
    for step in range(member.ring):
        begun = None
        if step + 1 < member.ring:
            # k, v [B, frames of r − step, S, h_kv, D] -> [B, frames of r − step − 1, S, h_kv, D]
            begun = yield from _begin_shift(
                member, [k, v], len(ranges[(member.ring_index - step - 1) % member.ring])
            )
        pieces = tiles(layout, mask, mine, ranges[(member.ring_index - step) % member.ring])
        if pieces or out is None:
            part = kernels.block_attention(
                q, repeat_heads(k, spans), repeat_heads(v, spans), pieces
            )
            if out is None or lse is None:
                out, lse = (
                    part if member.ring == 1 else (part[0].to(accumulation_dtype(q.dtype)), part[1])
                )
            else:
                out, lse = merge(out, lse, part[0].to(out.dtype), part[1])
        if begun is not None:
            k, v = yield from _finish_shift(member, begun)
    return out, lse


def backward(
    member: Member,
    layout: ClipLayout,
    mask: AttentionMask,
    kernels: Kernels,
    ranges: tuple[FrameRange, ...],
    spans: HeadSpans,
    grad: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    cache: Cache | None = None,
) -> Program:
    """Return the gradients of q, k, v, given that of out.

    kept = q, k, v, out, LSE: the inputs and results of `forward`.
    """
    q, k, v, out, lse = kept
    mine, wide = ranges[member.ring_index], accumulation_dtype(q.dtype)
    blocks = [
        tiles(layout, mask, mine, ranges[(member.ring_index - step) % member.ring])
        for step in range(member.ring)
    ]
    # Without a ring the kernel's gradients are final: no sum in the wider dtype is needed.
    if member.ring == 1 and cache is None and blocks[0]:
        dq, dk, dv = kernels.block_attention_backward(
            grad, q, repeat_heads(k, spans), repeat_heads(v, spans), out, lse, blocks[0]
        )
        return dq, sum_heads(dk, spans), sum_heads(dv, spans)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    if cache is not None:
        pieces = cache_tiles(layout, mask, mine, cache[2])
        dq += kernels.block_attention_backward(
            grad, q, *(repeat_heads(x, spans) for x in cache[:2]), out, lse, pieces
        )[0]
    # Blocks move as in forward, and the gradients of a block move along with it. They are added
    # late, so that their shift overlaps with the computation of the next block.
    arriving = None
    for step, pieces in enumerate(blocks):
        begun = None
        coming = len(ranges[(member.ring_index - step - 1) % member.ring])
        if step + 1 < member.ring:
            # k, v of the block of r − step -> those of the block of r − step − 1
            begun = yield from _begin_shift(member, [k, v], coming)
        part = None
        if pieces:
            part = kernels.block_attention_backward(
                grad, q, repeat_heads(k, spans), repeat_heads(v, spans), out, lse, pieces
            )
            dq += part[0]
        if arriving is not None:
            dk, dv = yield from _finish_shift(member, arriving)
        if part is not None:
            dk, dv = dk + sum_heads(part[1], spans), dv + sum_heads(part[2], spans)
        if begun is not None:
            k, v = yield from _finish_shift(member, begun)
        if member.ring > 1:
            # dk, dv of the block of r − step -> those of the block of r − step − 1; the last time
            # they arrive at their own rank
            arriving = yield from _begin_shift(member, [dk, dv], coming)
    if arriving is not None:
        dk, dv = yield from _finish_shift(member, arriving)
    return dq, dk, dv
