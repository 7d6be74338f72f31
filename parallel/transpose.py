"""Deal rollouts over the ranks of a sequence group by clips, and turn clips into frames and back.

A student's chunk is too short to be split over ranks, its score networks need whole clips. So the
ranks of a group roll out different clips, [n, T] each, and one all-to-all turns them into frames of
all clips, [P·n, T/P] each, which the score networks take split over time; what comes back for the
student returns the same way. A group with fewer clips than ranks is *replicated*: every rank makes
the same rollouts, and the gradients of their chunks are dealt over ranks. In both, gradients are
summed over ranks and nothing is divided by P, so both equal one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Exchange, Member, Program
from parallel.layout import ClipLayout
from parallel.sequence import SequenceShard


@dataclass(frozen=True)
class Share:
    """Describe one rank's part of its group's rollouts.

    clips: those that it rolls out; turn, of: of every `of` chunks it back-propagates the one at
    place `turn`; (0, 1) are all.
    """

    clips: range
    turn: int = 0
    of: int = 1

    @property
    def replicated(self) -> bool:
        """Return whether the other ranks of the group roll out the same clips."""
        return self.of > 1


def share_of(sequence: SequenceShard, clips: int) -> Share:
    """Return this rank's part of a group's clips: its own clips if they divide by P, else chunks of
    all clips."""
    (member,) = sequence.comm.members
    if clips % member.size:
        return Share(range(clips), member.index, member.size)
    each = clips // member.size
    return Share(range(member.index * each, (member.index + 1) * each))


def to_frames(sequence: SequenceShard, share: Share, x: Tensor) -> Tensor:
    """Turn this rank's clips into this rank's frames of all clips: [n, T, …] -> [P·n, T/P, …]."""
    if share.replicated:
        return x[:, sequence.frames.start : sequence.frames.stop]
    return _transposed(sequence, x, back=False)


def to_clips(sequence: SequenceShard, share: Share, x: Tensor) -> Tensor:
    """Turn frames of all clips into whole clips, this rank's own: [P·n, T/P, …] -> [n, T, …].

    Replicated, all clips are its own.
    """
    if share.replicated:
        return sequence.gather([x])[0]
    return _transposed(sequence, x, back=True)


def _transposed(sequence: SequenceShard, x: Tensor, back: bool) -> Tensor:
    if sequence.comm.members[0].size == 1:
        return x
    return sequence.comm.apply(TransposeVerb(sequence.layout, back), x)[0]


@dataclass(frozen=True)
class TransposeVerb:
    """Exchange clips for frames, or back; each direction is the other's backward."""

    layout: ClipLayout
    back: bool
    name = "transpose"

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        (x,) = tensors
        assert x is not None
        out = yield from (_frames_to_clips if self.back else _clips_to_frames)(
            self.layout, member, x
        )
        return (out,), (), None

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        (grad,) = grads
        assert grad is not None, "the only output has no gradient"
        turned = _clips_to_frames if self.back else _frames_to_clips
        return ((yield from turned(self.layout, member, grad)),)


def _clips_to_frames(layout: ClipLayout, member: Member, x: Tensor) -> Program:
    """[n, T, …] -> [P·n, T/P, …], the clips of rank 0 first."""
    held, me, n = layout.split(member.size), member.index, x.shape[0]
    blocks = [x[:, r.start : r.stop] for r in held]
    parts = [x.new_empty(0) if q == me else b.reshape(b.numel()) for q, b in enumerate(blocks)]
    shape = (n, len(held[me]), *x.shape[2:])
    # [n, T_q, …] to each other rank q -> [n, T/P, …] from each
    answers = yield Exchange(parts, _from_others(member, [shape] * member.size, x))
    pieces = [blocks[me] if q == me else answers[q].reshape(shape) for q in range(member.size)]
    return torch.cat(pieces, 0)


def _frames_to_clips(layout: ClipLayout, member: Member, x: Tensor) -> Program:
    """[P·n, T/P, …] -> [n, T, …], the transpose of the above."""
    held, me, n = layout.split(member.size), member.index, x.shape[0] // member.size
    blocks = list(x.split(n, 0))
    parts = [x.new_empty(0) if q == me else b.reshape(b.numel()) for q, b in enumerate(blocks)]
    shapes = [(n, len(r), *x.shape[2:]) for r in held]
    # [n, T/P, …] of rank q's clips to each other rank q -> [n, T_q, …] from each
    answers = yield Exchange(parts, _from_others(member, shapes, x))
    pieces = [blocks[me] if q == me else answers[q].reshape(shapes[q]) for q in range(member.size)]
    return torch.cat(pieces, 1)


def _from_others(member: Member, shapes: list[tuple[int, ...]], x: Tensor) -> list[list[Tensor]]:
    """Return meta tensors of what each rank sends here, nothing from this one."""
    return [
        [] if q == member.index else [torch.empty(shape, dtype=x.dtype, device="meta")]
        for q, shape in enumerate(shapes)
    ]
