"""Scan frame-wise gated delta-net states over a split clip, exactly, with one all-gather each way.

Over the frames a…b of one rank the recurrence S_t = S_{t-1} M_t + U_t is affine: S_b = S_{a-1} C +
H with C = M_a … M_b and H = S_b from a zero start. So every rank computes its (C, H_fwd, H_rev),
one all-gather gives all of them to every rank, and each rank composes the states that enter its
frames from the left and from the right; then it runs its local frames from there.

- M is symmetric (M = γ(I − A), A a Gram matrix), so the composite of the reverse direction is M_b …
  M_a = C^T: one C serves both.
- C contains no cuts. A document edge on a rank boundary closes the forward direction there and may
  leave the reverse one open; a cut inside C would close both. `edges(layout, direction)` decides
  instead if a state passes through a rank.
- H_fwd and H_rev contain the cuts. A closed edge passes nothing: the exclusive reverse R_t =
  R_{t+1} M_{t+1} + U_{t+1} is 0 at a closed edge.
- Padding frames are γ = 1, A = 0, U = 0, that is M = I; ranks without frames have C = I, H = 0 and
  pass everything through.

Backward is the same prefix problem in the opposite rank order: the adjoint λ_t = dL/dF_t obeys λ_t
= G_t + λ_{t+1} M_{t+1}, so what leaves a rank to the left is X + y C^T with y what entered from the
right. C is known from the forward pass; only X (and its mirror image Z) is gathered. The local
states are recomputed, so no graph over T steps is kept.

Elements that a rank sends to each other rank: forward Σ over streams of B·H·(D² + 2·E·D), backward
Σ B·H·2·E·D (one E·D less each without a reverse pass), in float32 (float64 for float64 inputs);
with an initial state backward adds B·H·E·D per stream for the final state's gradient.
`parallel/README.md` derives these formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from parallel.comm import AllGather, Member, Program, pack, unpack
from parallel.layout import ClipLayout, FrameRange, edges
from parallel.local_attention import accumulation_dtype
from parallel.reference import Cuts, Kernels, Stream

Reverse = Literal["inclusive", "exclusive"] | None


class ScanOutput(NamedTuple):
    """Store the result of a scan, one entry per stream.

    states: [B, T/P, H, E, D], the forward inclusive state plus the reverse state. final: [B, H, E,
    D], F after the clip's last frame, the same on all ranks; its gradients are summed over ranks.
    """

    states: list[Tensor]
    final: list[Tensor]


def local_cuts(layout: ClipLayout, frames: FrameRange, continued: bool) -> Cuts:
    """Return the open edges of a rank's frames; a continued stream opens edge 0."""
    ahead, behind = edges(layout, "forward"), edges(layout, "reverse")
    return Cuts(
        tuple(ahead[i] or (i == 0 and continued) for i in range(frames.start, frames.stop)),
        tuple(behind[i + 1] for i in range(frames.start, frames.stop)),
    )


@dataclass(frozen=True)
class ScanVerb:
    """Scan `streams` recurrences with one all-gather.

    tensors: decay, gram and update of every stream, then, if `continued`, one initial state [B, H,
    E, D] per stream.
    """

    layout: ClipLayout
    streams: int
    reverse: Reverse
    continued: bool
    kernels: Kernels
    name = "scan"

    def _cuts(self, size: int) -> list[Cuts]:
        return [local_cuts(self.layout, r, self.continued) for r in self.layout.split(size)]

    def _split(self, tensors: Sequence[Tensor | None]) -> tuple[list[Stream], list[Tensor | None]]:
        groups = [tensors[3 * i : 3 * i + 3] for i in range(self.streams)]
        streams = [Stream(*group) for group in groups]  # type: ignore[arg-type]
        initial: list[Tensor | None] = (
            [*tensors[3 * self.streams :]] if self.continued else [None] * self.streams
        )
        return streams, initial

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        streams, initial = self._split(tensors)
        cuts = self._cuts(member.size)
        mine = cuts[member.index]
        starts = [
            None if x is None else x.to(accumulation_dtype(s.update.dtype))
            for x, s in zip(initial, streams, strict=True)
        ]
        # One rank: the local states are the states.
        if member.size == 1:
            outputs = [
                self.kernels.local_states(s, mine, self.reverse, start, None)
                for s, start in zip(streams, starts, strict=True)
            ]
            kept: list[Tensor | None] = [x for start in starts for x in (start, None)]
            return (
                (*(o[0] for o in outputs), *(o[1] for o in outputs)),
                (*tensors[: 3 * self.streams], *kept),
                None,
            )
        # Exchange the composites of all streams in one collective.
        composites = [
            [x for x in self.kernels.local_composites(s, mine, self.reverse) if x is not None]
            for s in streams
        ]
        like = [x for group in composites for x in group]
        # per stream C [B, H, D, D], H_fwd and H_rev [B, H, E, D], all streams in one buffer -> the
        # same of every rank
        gathered = yield AllGather(pack(like))
        everyone = [unpack(flat, like) for flat in gathered]
        # Compose what enters this rank's frames from both sides, and run them from there.
        width = 2 if self.reverse is None else 3
        outputs, kept, chains = [], [], []
        for i, (stream, start) in enumerate(zip(streams, starts, strict=True)):
            products = [parts[width * i] for parts in everyone]
            ahead = _prefix(
                products,
                [parts[width * i + 1] for parts in everyone],
                [all(c.forward) for c in cuts],
                start,
            )
            back = None
            if self.reverse is not None:
                transposed = [c.transpose(-1, -2) for c in products]
                ends = [parts[width * i + 2] for parts in everyone]
                back = _suffix(transposed, ends, [all(c.reverse) for c in cuts], None)[member.index]
            final = ahead[-1]
            assert final is not None
            outputs.append(
                (
                    self.kernels.local_states(
                        stream, mine, self.reverse, ahead[member.index], back
                    )[0],
                    final,
                )
            )
            kept += [ahead[member.index], back]
            chains += products
        return (
            (*(o[0] for o in outputs), *(o[1] for o in outputs)),
            (*tensors[: 3 * self.streams], *kept, *chains),
            None,
        )

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: None,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        n = self.streams
        streams, _ = self._split(kept)
        starts = [(kept[3 * n + 2 * i], kept[3 * n + 2 * i + 1]) for i in range(n)]
        if not self.continued and any(g is not None for g in grads[n:]):
            raise ValueError(
                "gradient of a final state was asked for: got initial=None, expected initial states"
                " (SequenceShard.scan). Fix: pass initial=[zeros [B, H, E, D], …], which makes the"
                " scan a differentiable piece of a stream"
            )
        upstream = [_zeros_like_states(s) if g is None else g for g, s in zip(grads, streams)]
        cuts = self._cuts(member.size)
        mine = cuts[member.index]
        final: list[Tensor | None] = [None] * n
        if self.continued:
            final = [
                _zeros_like_states(s)[:, :0].sum(1) if g is None else g
                for g, s in zip(grads[n:], streams)
            ]
        # Exchange the gradients that leave each rank's frames, and compose what enters these.
        from_right: list[Tensor | None] = list(final)
        from_left: list[Tensor | None] = [None] * n
        if member.size > 1:
            leaving = [
                self.kernels.local_adjoint_composites(s, mine, self.reverse, g)
                for s, g in zip(streams, upstream)
            ]
            like = [
                x for group, last in zip(leaving, final) for x in (*group, last) if x is not None
            ]
            # per stream X and Z [B, H, E, D] (and the final state's gradient), all streams in one
            # buffer -> the same of every rank
            gathered = yield AllGather(pack(like))
            everyone = [unpack(flat, like) for flat in gathered]
            chains = kept[5 * n :]
            width = len(like) // n
            for i in range(n):
                products = cast(list[Tensor], [*chains[member.size * i : member.size * (i + 1)]])
                last = (
                    None
                    if final[i] is None
                    else torch.stack([parts[width * i + width - 1] for parts in everyone]).sum(0)
                )
                ends = [parts[width * i] for parts in everyone]
                transposed = [c.transpose(-1, -2) for c in products]
                from_right[i] = _suffix(transposed, ends, [all(c.forward) for c in cuts], last)[
                    member.index
                ]
                if self.reverse is not None:
                    ends = [parts[width * i + 1] for parts in everyone]
                    from_left[i] = _prefix(products, ends, [all(c.reverse) for c in cuts], None)[
                        member.index
                    ]
        # Recompute the local states and run their adjoint with the gradients that enter.
        out: list[Tensor | None] = []
        initial: list[Tensor | None] = []
        for i, (stream, g) in enumerate(zip(streams, upstream)):
            local, to_start = self.kernels.local_adjoint(
                stream, mine, self.reverse, *starts[i], g, from_right[i], from_left[i]
            )
            out += [x.to(like.dtype) for x, like in zip(local, stream)]
            # the whole gradient goes to the rank with frame 0: gradients of all ranks are summed
            if self.continued:
                initial.append(
                    to_start if member.index == 0 else _zeros_like_states(stream)[:, :0].sum(1)
                )
        return (*out, *initial)


def _zeros_like_states(stream: Stream) -> Tensor:
    """Return zeros [B, T/P, H, E, D] in the accumulation dtype."""
    return torch.zeros(
        stream.update.shape,
        dtype=accumulation_dtype(stream.update.dtype),
        device=stream.update.device,
    )


def _product(state: Tensor, composite: Tensor) -> Tensor:
    """Multiply state [B, H, E, D] by composite [B, H, D, D], never in TF32.

    A composite is close to the identity, so rounding it to TF32 would be the whole error.
    """
    if state.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        return torch.matmul(state.double(), composite.double()).to(state.dtype)
    return torch.matmul(state, composite)


def _prefix(
    products: list[Tensor], ends: list[Tensor], passes: list[bool], start: Tensor | None
) -> list[Tensor | None]:
    """Return value[p], what enters rank p from the left; value[P] leaves the last rank.

    value[p+1] = ends[p] + value[p] · products[p].
    """
    values = [start]
    for product, end, open_through in zip(products, ends, passes, strict=True):
        before = values[-1]
        values.append(
            end if before is None or not open_through else end + _product(before, product)
        )
    return values


def _suffix(
    products: list[Tensor], ends: list[Tensor], passes: list[bool], start: Tensor | None
) -> list[Tensor | None]:
    """Return value[p], the state that enters rank p from the right (`start` at the last rank)."""
    return _prefix(products[::-1], ends[::-1], passes[::-1], start)[-2::-1]
