"""Compute softmax attention over the whole clip while every rank stores only its own frames.

Two exchanges give the same result; `attend_cost.cheaper_exchange` chooses between them by bytes.

- usp = Ulysses × ring. Ulysses turns "all heads, some frames" into "some heads, all frames of this
  ring rank"; the ring then passes key and value blocks from rank to rank. Ring 1 is plain Ulysses,
  Ulysses 1 a plain ring, and with both 1 only the local kernel runs.
- need: keys and values of exactly the frames that the mask lets a rank see (`need.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel import need, ring, ulysses
from parallel.comm import Member, Program
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import AttentionMask
from parallel.reference import Kernels

Frames = tuple[FrameRange, ...]
Heads = tuple[FrameRange, ...]
Exchange = str  # "usp" or "need"


@dataclass(frozen=True)
class AttendVerb:
    """Compute attention: q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D] -> out [B, T/P, S, H, D].

    part: the frames of the clip that q, k and v hold, split over the ranks. With cached frames
    there are two more inputs: their keys and values [B, c, S, H_kv, D], the same on all ranks and
    without gradient. exchange: how keys and values of other ranks are reached.
    """

    layout: ClipLayout
    mask: AttentionMask
    kernels: Kernels
    heads: int
    key_heads: int
    part: FrameRange
    cached: tuple[int, ...] = ()
    exchange: Exchange = "usp"
    name = "attend"

    def _plan(self, member: Member) -> tuple[list[int], Frames, Heads, Heads, ring.HeadSpans]:
        """Return the split of frames and heads that this rank works with.

        In order: frame counts of the Ulysses ranks of this ring rank; frames of each ring rank;
        query heads and key heads of each Ulysses rank; the query heads that read each local key
        head.
        """
        held = need.held_frames(self.layout, self.part, member.size)
        groups = [held[r * member.ulysses : (r + 1) * member.ulysses] for r in range(member.ring)]
        queries, keys = ulysses.deal_heads(self.heads, self.key_heads, member.ulysses)
        spans = ulysses.head_spans(queries[member.ulysses_index], self.heads // self.key_heads)
        ranges = tuple(FrameRange(g[0].start, g[-1].stop) for g in groups)
        return [len(r) for r in groups[member.ring_index]], ranges, queries, keys, spans

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        q, k, v, *past = (x for x in tensors if x is not None)
        if self.exchange == "need":
            ulysses.check_heads(self.heads, self.key_heads, 1)
            known = need.Far(past[0], past[1], self.cached) if past else None
            out, lse, far = yield from need.forward(
                member, self.layout, self.mask, self.kernels, self.part, q, k, v, known
            )
            facts = (far.frames if far else None, len(past))
            return (out,), (q, k, v, out, lse, *(far[:2] if far else ())), facts
        frames, ranges, queries, keys, spans = self._plan(member)
        # [B, T/P, S, H, D] -> [B, T·U/P, S, H/U, D], for q, k and v in one all-to-all
        q, k, v = yield from ulysses.to_heads(member, frames, [q, k, v], [queries, keys, keys])
        mine = keys[member.ulysses_index]
        past = [x[:, :, :, mine.start : mine.stop] for x in past]
        cache = (past[0], past[1], self.cached) if past else None
        out, lse = yield from ring.forward(
            member, self.layout, self.mask, self.kernels, ranges, spans, q, k, v, cache
        )
        out = out.to(q.dtype)
        # [B, T·U/P, S, H/U, D] -> [B, T/P, S, H, D]
        result = yield from ulysses.to_frames(member, frames, [out], [queries])
        return tuple(result), (q, k, v, out, lse, *past), None

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        q, k, v, out, lse, *past = (x for x in kept if x is not None)
        grad = grads[0]
        if self.exchange == "need":
            frames, inputs = facts
            far = need.Far(past[0], past[1], frames) if past else None
            grad = torch.zeros_like(out) if grad is None else grad
            own = (q, k, v, out, lse)
            result = yield from need.backward(
                member, self.layout, self.mask, self.kernels, self.part, grad, own, far
            )
            return (*result, *(None for _ in range(inputs)))
        frames, ranges, queries, keys, spans = self._plan(member)
        # ranks must agree on collectives even if one of them has no use for its result
        if grad is None:
            grad = out.new_zeros(
                out.shape[0], frames[member.ulysses_index], out.shape[2], self.heads, out.shape[4]
            )
        # [B, T/P, S, H, D] -> [B, T·U/P, S, H/U, D]
        (grad,) = yield from ulysses.to_heads(member, frames, [grad], [queries])
        cache = (past[0], past[1], self.cached) if past else None
        own = (q, k, v, out, lse)
        dq, dk, dv = yield from ring.backward(
            member, self.layout, self.mask, self.kernels, ranges, spans, grad, own, cache
        )
        narrow = [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)]
        # [B, T·U/P, S, H/U, D] -> [B, T/P, S, H, D], for dq, dk and dv in one all-to-all
        result = yield from ulysses.to_frames(member, frames, narrow, [queries, keys, keys])
        return (*result, *(None for _ in past))
