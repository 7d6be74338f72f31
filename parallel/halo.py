"""Fetch exactly those frames beyond the local ones that a temporal convolution reads.

Tap j of local frame i is frame i + j − before of the clip. A convolution of width before + 1 +
after is Σ_j W_j @ tap_j. A halo may span several ranks (T/P < width), and ranks without frames take
part without requesting any.

One exchange serves all tensors: rank p sends rank q those frames of its own that q's halo contains.
Bytes sent by a rank with a full neighbour on both sides: (before + after) · Σ bytes of one frame of
each tensor. Backward sends the gradients of the same frames back, where they are summed in rank
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from parallel.comm import Exchange, Member, Program, pack, unpack
from parallel.layout import ClipLayout, FrameRange

NOTHING = FrameRange(0, 0)


@dataclass(frozen=True, eq=False)
class Taps(Sequence[Tensor]):
    """Cut and mask the taps of a temporal convolution on access.

    A fused kernel reads `extended` itself. extended: [B, before + t + after, …], zero beyond the
    clip. seen: per local frame (first visible tap, one past the last), where an edge inside the
    clip hides any; None: every frame sees all taps.
    """

    extended: Tensor
    before: int
    frames: int
    seen: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return self.extended.shape[1] - self.frames + 1

    @overload
    def __getitem__(self, j: int) -> Tensor: ...
    @overload
    def __getitem__(self, j: slice) -> list[Tensor]: ...
    def __getitem__(self, j: int | slice) -> Tensor | list[Tensor]:
        """Return tap j of every local frame, [B, t, …]: a view where nothing is hidden."""
        if isinstance(j, slice):
            return [self[i] for i in range(len(self))[j]]
        j = range(len(self))[j]
        piece = self.extended[:, j : j + self.frames]
        hidden = [not first <= j < stop for first, stop in self.seen or ()]
        if not any(hidden):
            return piece
        mask = torch.tensor(hidden, device=piece.device).reshape(
            1, self.frames, *[1] * (piece.dim() - 2)
        )
        return piece.masked_fill(mask, 0)


def visible_taps(
    limits: Sequence[FrameRange], local: FrameRange, before: int, after: int
) -> tuple[tuple[int, int], ...] | None:
    """Return `Taps.seen` of the local frames, given `limits` of `layout.halo_limits`."""
    seen, clip = [], FrameRange(0, len(limits))
    for i in range(local.start, local.stop):
        first, stop = (
            max(0, limits[i].start - i + before),
            min(before + 1 + after, limits[i].stop - i + before),
        )
        # frames outside the clip are zero already
        seen.append(
            (
                0 if limits[i].start == clip.start else first,
                before + 1 + after if limits[i].stop == clip.stop else stop,
            )
        )
    return None if all(pair == (0, before + 1 + after) for pair in seen) else tuple(seen)


@dataclass(frozen=True)
class HaloVerb:
    """Extend the local frames to both sides: [B, T/P, …] -> [B, before + T/P + after, …].

    Frames beyond the clip's ends are zero.
    """

    layout: ClipLayout
    before: int
    after: int
    name = "halo"

    def plan(self, member: Member) -> tuple[FrameRange, list[FrameRange], list[FrameRange]]:
        """Return (local frames, frames to send to each rank, frames to receive from each rank)."""
        held = self.layout.split(member.size)
        wanted = [
            FrameRange(max(0, r.start - self.before), min(self.layout.frames, r.stop + self.after))
            if len(r)
            else NOTHING
            for r in held
        ]
        me = member.index
        send = [NOTHING if q == me else _overlap(held[me], wanted[q]) for q in range(member.size)]
        receive = [
            NOTHING if q == me else _overlap(held[q], wanted[me]) for q in range(member.size)
        ]
        return held[me], send, receive

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        inputs = [x for x in tensors if x is not None]  # [B, T/P, …] each
        mine, send, receive = self.plan(member)
        like = [(x.shape, x.dtype, x.device) for x in inputs]
        pieces: list[list[Tensor]] = [[] for _ in inputs]
        answers: list[Tensor] = []
        if member.size > 1:
            parts = [
                pack([x[:, r.start - mine.start : r.stop - mine.start] for x in inputs])
                for r in send
            ]
            # [B, frames for q, …] of every tensor, flat -> [B, frames from q, …] of every tensor,
            # flat
            answers = yield Exchange(parts, [_frames(inputs, r) for r in receive])
        for q in range(member.size):
            local = inputs if q == member.index else unpack(answers[q], _frames(inputs, receive[q]))
            for piece, x in zip(pieces, local):
                piece.append(x)
        # Frames beyond the clip's ends are zero.
        left = self.before - sum(len(r) for r in receive[: member.index])
        right = self.after - sum(len(r) for r in receive[member.index + 1 :])
        return tuple(_concat(piece, left, right) for piece in pieces), (), like

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: list,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        mine, send, receive = self.plan(member)
        full = [
            torch.zeros(s[0], s[1] + self.before + self.after, *s[2:], dtype=t, device=d)
            if g is None
            else g
            for g, (s, t, d) in zip(grads, facts)
        ]
        own = [g[:, self.before : self.before + len(mine)] for g in full]
        if member.size == 1:
            return tuple(own)
        first = mine.start - self.before  # clip frame of row 0 of the extended tensors
        parts = [
            pack([g[:, r.start - first : r.stop - first] if len(r) else g[:, :0] for g in full])
            for r in receive
        ]
        # gradients of the frames received from q go back to q
        answers = yield Exchange(parts, [_frames(own, r) for r in send])
        out = [g.clone() for g in own]
        for q, r in enumerate(send):
            for total, part in zip(out, unpack(answers[q], _frames(own, r))):
                if len(r):
                    total[:, r.start - mine.start : r.stop - mine.start] += part
        return tuple(out)


def _overlap(a: FrameRange, b: FrameRange) -> FrameRange:
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return FrameRange(start, stop) if start < stop else NOTHING


def _like(x: Tensor, frames: int) -> Tensor:
    """Return a meta tensor with the shape and dtype of `frames` frames of x."""
    return torch.empty(x.shape[0], frames, *x.shape[2:], dtype=x.dtype, device="meta")


def _frames(inputs: list[Tensor], r: FrameRange) -> list[Tensor]:
    return [_like(x, len(r)) for x in inputs]


def _concat(pieces: list[Tensor], left: int, right: int) -> Tensor:
    x = pieces[0]
    pads = [x.new_zeros(x.shape[0], n, *x.shape[2:]) for n in (left, right)]
    whole = [pads[0], *pieces, pads[1]]
    kept = [p for p in whole if p.shape[1]]
    return torch.cat(kept, 1) if kept else x.clone()
