"""attend: softmax attention over the whole clip when every member holds only its own frames.

USP = Ulysses × ring. Ulysses turns "all heads, some frames" into "some heads, all frames of this ring member"; the ring then passes key
and value blocks round, and partial results are merged by their log-sum-exp. Ring 1 is plain Ulysses, ulysses 1 a plain ring.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parallel.comm import Member, Program
from parallel.layout import ClipLayout
from parallel.masks import AttentionMask, tiles
from parallel.reference import Kernels


@dataclass(frozen=True)
class AttendVerb:
    """tensors: q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D] -> out [B, T/P, S, H, D]"""

    layout: ClipLayout
    mask: AttentionMask
    kernels: Kernels
    name = "attend"

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        q, k, v = tensors
        mine = self.layout.split(member.size)[member.index]
        pieces = tiles(self.layout, self.mask, mine, mine)
        out, lse = self.kernels.block_attention(q, k, v, pieces)
        return (out,), (q, k, v, out, lse), None
        yield

    def backward(self, member: Member, kept: tuple[Tensor | None, ...], facts: None, grads: tuple[Tensor | None, ...]) -> Program:
        q, k, v, out, lse = kept
        mine = self.layout.split(member.size)[member.index]
        pieces = tiles(self.layout, self.mask, mine, mine)
        if grads[0] is None:
            return None, None, None
        dq, dk, dv = self.kernels.block_attention_backward(grads[0], q, k, v, out, lse, pieces)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
        yield
