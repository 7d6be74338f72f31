"""Predict what one call of attention sends under either exchange, and choose the cheaper one.

From integers alone, written independently of the algorithms; bytes are those that one rank sends to
others.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from parallel.attend import AttendVerb, Exchange
from parallel.comm import Member
from parallel.layout import split_evenly
from parallel.local_attention import accumulation_dtype
from parallel.masks import visible

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Cost(NamedTuple):
    """Store the number of collectives and the bytes sent of one verb call."""

    collectives: int
    sent: int


def attend_cost(verb: AttendVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return the cost of attention.

    Ulysses: q, k, v heads out and out heads back, the reverse in backward. Ring: R − 1 shifts of k,
    v; backward as many, and R of dk, dv. Needed frames: k, v of own frames that others see;
    backward dk, dv of theirs that own frames see.
    """
    if verb.exchange == "need":
        return _need_cost(verb, tensors, member)
    (b, _, s, _, d), dtype = tensors[0]
    width, token = dtype.itemsize, b * s * d
    group = verb.heads // verb.key_heads
    frames = [len(r) for r in verb.layout.cut(verb.part).split(member.size)]
    rows = [frames[r * member.ulysses : (r + 1) * member.ulysses] for r in range(member.ring)]
    queries = [len(r) for r in split_evenly(verb.heads, member.ulysses)]
    keys = [
        -(-r.stop // group) - r.start // group for r in split_evenly(verb.heads, member.ulysses)
    ]
    me, forward, backward, calls = member.ulysses_index, 0, 0, [0, 0]
    t = rows[member.ring_index][me]
    if member.ulysses > 1:
        calls = [2, 2]
        for j in (j for j in range(member.ulysses) if j != me):
            mine, theirs = t * token * width, rows[member.ring_index][j] * token * width
            forward += mine * (queries[j] + 2 * keys[j]) + theirs * queries[me]
            backward += mine * queries[j] + theirs * (queries[me] + 2 * keys[me])
    for step in range(member.ring if member.ring > 1 else 0):
        block = sum(rows[(member.ring_index - step) % member.ring]) * token * keys[me]
        last = step + 1 == member.ring
        forward += 0 if last else 2 * block * width
        backward += (0 if last else 2 * block * width) + 2 * block * accumulation_dtype(
            dtype
        ).itemsize
        calls = [calls[0] + (not last), calls[1] + 1 + (not last)]
    return {"forward": Cost(calls[0], forward), "backward": Cost(calls[1], backward)}


def _need_cost(verb: AttendVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    layout, part, me = verb.layout, verb.part, member.index
    real = layout.frames if layout.valid_frames is None else max(layout.valid_frames, default=0)
    held = [
        range(part.start + r.start, min(part.start + r.stop, real))
        for r in layout.cut(part).split(member.size)
    ]
    seen = [{j for i in frames for j in visible(layout, verb.mask, i)} for frames in held]
    moved = [
        [sum(j in seen[q] for j in frames) if p != q else 0 for q in range(member.size)]
        for p, frames in enumerate(held)
    ]
    (b, _, s, h, d), dtype = tensors[1]
    frame = 2 * b * s * h * d * dtype.itemsize
    calls = int(any(any(row) for row in moved))
    return {
        "forward": Cost(calls, sum(moved[me]) * frame),
        "backward": Cost(calls, sum(row[me] for row in moved) * frame),
    }


@lru_cache(maxsize=4096)
def cheaper_exchange(verb: AttendVerb, dtype: torch.dtype, ring: int, ulysses: int) -> Exchange:
    """Return the exchange with which the busiest ranks send less, forward and backward together;
    usp where both send the same.

    It is usp, too, where late frames see more than early ones without a bound: needed frames leave
    the queries where they are, so the last ranks would work for the first.
    """
    if ring * ulysses == 1 or verb.mask.late_frames_see_more:
        return "usp"
    members = [Member(r, u, ring, ulysses) for r in range(ring) for u in range(ulysses)]
    # the number of clips, tokens and channels changes nothing
    shapes = [((1, len(verb.part), 1, n, 1), dtype) for n in (verb.heads, verb.key_heads)]
    tensors = tuple((torch.Size(shape), kind) for shape, kind in (*shapes, shapes[1]))

    def sent(exchange: Exchange) -> int:
        costs = [attend_cost(replace(verb, exchange=exchange), tensors, m) for m in members]
        return sum(max(cost[way].sent for cost in costs) for way in ("forward", "backward"))

    return "need" if sent("need") < sent("usp") else "usp"
