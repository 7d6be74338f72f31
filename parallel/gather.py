"""Give every rank all frames of a clip, for what needs them at once.

[B, T/P, …] -> [B, T, …] on every rank, by one exchange in which each rank sends its own frames to
each other rank. Backward is the transpose: each rank sends every other rank the gradients of that
rank's frames, where they are summed in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Exchange, Member, Program, pack, unpack
from parallel.layout import ClipLayout
from parallel.local_attention import accumulation_dtype


@dataclass(frozen=True)
class GatherVerb:
    """Gather all frames of several tensors with one exchange: [B, T/P, …] -> [B, T, …]."""

    layout: ClipLayout
    name = "gather"

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        inputs = [x for x in tensors if x is not None]
        held, me = [len(r) for r in self.layout.split(member.size)], member.index
        facts = [(x.shape, x.dtype, x.device) for x in inputs]
        mine = pack(inputs)
        parts = [mine[:0] if q == me else mine for q in range(member.size)]
        like = [[_frames(x, 0 if q == me else n) for x in inputs] for q, n in enumerate(held)]
        # [B, T/P, …] of every tensor, flat, to each other rank -> [B, T_q, …] from each, flat
        answers = yield Exchange(parts, like)
        pieces = [inputs if q == me else unpack(answers[q], like[q]) for q in range(member.size)]
        return tuple(torch.cat(column, 1) for column in zip(*pieces, strict=True)), (), facts

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        held, me = self.layout.split(member.size), member.index
        full = [
            torch.zeros(s[0], self.layout.frames, *s[2:], dtype=dtype, device=device)
            if g is None
            else g
            for g, (s, dtype, device) in zip(grads, facts, strict=True)
        ]
        parts = [
            pack([g[:, :0] if q == me else g[:, r.start : r.stop] for g in full])
            for q, r in enumerate(held)
        ]
        mine = len(held[me])
        like = [[_frames(x, 0 if q == me else mine) for x in full] for q in range(member.size)]
        # [B, T_q, …] of every gradient, flat, to each other rank q -> [B, T/P, …] from each, flat
        answers = yield Exchange(parts, like)
        own = [g[:, held[me].start : held[me].stop] for g in full]
        pieces = [own if q == me else unpack(answers[q], like[q]) for q in range(member.size)]
        return tuple(_sum(column) for column in zip(*pieces, strict=True))


def _frames(x: Tensor, frames: int) -> Tensor:
    """Return a meta tensor with the shape and dtype of `frames` frames of x."""
    return torch.empty(x.shape[0], frames, *x.shape[2:], dtype=x.dtype, device="meta")


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    """Sum in rank order, in the accumulation dtype."""
    total = parts[0].to(accumulation_dtype(parts[0].dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
