"""Define `SequenceShard`, all that a model or an objective may know about parallelism.

Five verbs (attend, scan, halo, mean, gather) on tensors of the local frames [B, T/P, …]. On one
device the local frames are all frames. Documents, chunks and padding come from the layout and hold
under every verb but gather: a padding frame neither attends nor is attended to, carries no state,
is zero in halos and weighs nothing in means.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.attend import AttendVerb, Exchange
from parallel.attend_cost import cheaper_exchange
from parallel.clip_mean import MeanVerb
from parallel.comm import Communicator, SoloComm
from parallel.engines import AttentionEngine, check_engine
from parallel.gather import GatherVerb
from parallel.gdn_scan import Reverse, ScanOutput, ScanVerb
from parallel.halo import HaloVerb, Taps, visible_taps
from parallel.layout import ClipLayout, FrameRange, halo_limits
from parallel.masks import FULL, AttentionMask
from parallel.reference import REFERENCE, Kernels, Stream

HaloEdges = Literal["clip", "document", "chunk"]
Recompute = Literal["answers", "keep_attention", "collectives"]  # see checkpointing.py


class Cache(NamedTuple):
    """Store keys and values [B, c, S, H_kv, D] of c frames, and which frames of the clip they are.

    Complete on every rank. frames: -1 is an empty place.
    """

    keys: Tensor
    values: Tensor
    frames: tuple[int, ...]


class SequenceShard(Protocol):
    """Represent one rank's view of a clip."""

    @property
    def layout(self) -> ClipLayout: ...

    @property
    def recompute(self) -> Recompute:
        """Return what checkpointing does with collectives; models do not use it."""
        ...

    @property
    def comm(self) -> Communicator:
        """Return the communicator, for checkpointing and counting traffic; models do not use it."""
        ...

    @property
    def kernels(self) -> Kernels:
        """Return the local kernels, for checkpointing; models do not use it."""
        ...

    @property
    def frames(self) -> FrameRange:
        """Return the local frames of the clip; contiguous, may be empty."""
        ...

    @property
    def clip_frames(self) -> int:
        """Return T, the frames of the whole clip; rows with documents of their own have no one
        `layout` to ask (`RowsSequence`)."""
        ...

    @property
    def positions(self) -> Tensor:
        """Return the time index of each local frame (`ClipLayout.position_of`), [1, T/P] or
        [B, T/P] int64 on the CPU.
        """
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend over the clip: q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D] -> like q.

        H is a multiple of H_kv; a row that sees no key gives zeros. cache: keys and values of
        frames that k and v do not hold (streaming), without gradient; the mask holds for them too.
        """
        ...

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        """Return the GDN states of all streams, with one collective.

        initial: per stream [B, H, E, D], the state before frame 0.
        """
        ...

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        """Return for each tensor [B, T/P, …] its before + 1 + after taps, [B, T/P, …] each.

        Tap j of frame i is frame i + j − before, zero beyond `edges`.
        """
        ...

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean [B] of value [B, T/P, …] over the whole clip.

        It is the same on all ranks. weight broadcasts to value from the left ([B, T/P]).
        """
        ...

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return all frames of each tensor: [B, T/P, …] -> [B, T, …], the same on all ranks.

        Gradients are summed over ranks.
        """
        ...

    def rewind(self) -> AbstractContextManager[None]:
        """Return a context in which verb calls count from where they stand now, for checkpointing.

        It may be entered any number of times; a model does not use it.
        """
        ...


class WholeClip(SequenceShard, Protocol):
    """Represent one rank's view of a clip from which a stretch of frames can be taken."""

    def part(self, frames: FrameRange) -> SequenceShard:
        """Return the verbs over these frames alone, split over the same ranks."""
        ...

    def relaid(self, layout: ClipLayout) -> WholeClip:
        """Return the verbs over the frames of another layout, split over the same ranks.

        With other documents, chunks or copies of the same frames, local frames stay the same.
        """
        ...


class GroupSequence:
    """Run the verbs for one rank of a sequence group, over any communicator."""

    def __init__(
        self,
        layout: ClipLayout,
        comm: Communicator,
        kernels: Kernels = REFERENCE,
        engine: tuple[str, AttentionEngine] | None = None,
        part: FrameRange | None = None,
        exchange: Exchange = "auto",
        recompute: Recompute = "answers",
    ) -> None:
        """Store the rank's view.

        engine: name and function of another attention (`engines.py`); part: the frames that the
        ranks hold, None: all; exchange: of attention, auto: by bytes; recompute: what checkpointing
        does with collectives.
        """
        (member,) = comm.members
        self.layout = layout
        self._part = part or FrameRange(0, layout.frames)
        self._own = layout if part is None else layout.cut(part)
        local = self._own.split(member.size)[member.index]
        self.frames = FrameRange(self._part.start + local.start, self._part.start + local.stop)
        self.comm = comm
        self.kernels = kernels
        self.engine = engine
        self.exchange = exchange
        self.recompute: Recompute = recompute

    @property
    def clip_frames(self) -> int:
        return self.layout.frames

    @property
    def positions(self) -> Tensor:
        return torch.tensor(
            [[self.layout.position_of(i) for i in range(self.frames.start, self.frames.stop)]],
            dtype=torch.int64,
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        if cache is not None and (cache.keys.requires_grad or cache.values.requires_grad):
            raise ValueError(
                "attention cache: got tensors that require gradients, expected detached keys and"
                " values. Fix: detach them"
            )
        q, k, v = as_autocast(q, k, v)
        past = () if cache is None else as_autocast(cache.keys, cache.values)
        if self.engine is not None:
            name, attention = self.engine
            check_engine(
                name, self.layout, mask, self.comm.members[0], q.shape[3], k.shape[3], cache
            )
            return attention(*(x.flatten(1, 2) for x in (q, k, v))).reshape(q.shape)
        cached = () if cache is None else cache.frames
        verb = AttendVerb(
            self.layout, mask, self.kernels, q.shape[3], k.shape[3], self._part, cached
        )
        return self.comm.apply(
            replace(verb, exchange=self._exchange(verb, k.dtype)), q, k, v, *past
        )[0]

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        real = self._real(streams[0].decay)
        if real is not None:
            # M = I, U = 0
            streams = [
                Stream(*(_fill(real, x, value) for x, value in zip(s, (1.0, 0.0, 0.0))))
                for s in streams
            ]
        verb = ScanVerb(self._own, len(streams), reverse, initial is not None, self.kernels)
        out = self.comm.apply(verb, *(x for s in streams for x in s), *(initial or ()))
        return ScanOutput(list(out[: len(streams)]), list(out[len(streams) :]))

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        limits = halo_limits(self._own, edges)
        real = self._real(tensors[0])
        if real is not None:
            tensors = [_fill(real, x, 0.0) for x in tensors]
        extended = self.comm.apply(HaloVerb(self._own, before, after), *tensors)
        start = self._part.start
        local = FrameRange(self.frames.start - start, self.frames.stop - start)
        seen = visible_taps(limits, local, before, after)
        return [Taps(x, before, len(self.frames), seen) for x in extended]

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        weight = weight.reshape(*weight.shape, *[1] * (value.dim() - weight.dim())).expand(
            value.shape
        )
        real = self._real(value)
        if real is not None:
            value = _fill(real, value, 0.0)
            weight = _fill(real, weight, 0.0)
        return self.comm.apply(MeanVerb(), value, weight)[0]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.comm.members[0].size == 1:
            return list(tensors)
        return list(self.comm.apply(GatherVerb(self._own), *tensors))

    def rewind(self) -> AbstractContextManager[None]:
        return nullcontext()  # every call stands alone

    def part(self, frames: FrameRange) -> SequenceShard:
        own = (self.layout, self.comm, self.kernels, self.engine)
        return type(self)(*own, frames, self.exchange, self.recompute)

    def _exchange(self, verb: AttendVerb, dtype: torch.dtype) -> Exchange:
        """Return how attention reaches the frames of other ranks, equally on all of them."""
        if self.exchange != "auto":
            return self.exchange
        (member,) = self.comm.members
        return cheaper_exchange(verb, dtype, member.ring, member.ulysses)

    def relaid(self, layout: ClipLayout) -> WholeClip:
        own = (self.comm, self.kernels, self.engine, None)
        return type(self)(layout, *own, self.exchange, self.recompute)

    def _real(self, like: Tensor) -> Tensor | None:
        """Return which frames are real (not padding), [B, T/P] bool; None: all."""
        if not self.layout.ragged:
            return None
        valid = torch.tensor(self.layout.valid_frames, device=like.device)
        if len(valid) != like.shape[0]:
            raise ValueError(
                f"rows do not fit the layout: got a batch of {like.shape[0]}, expected"
                f" {len(valid)}, one per valid_frames (SequenceShard)"
            )
        return (
            torch.arange(self.frames.start, self.frames.stop, device=like.device)[None]
            < valid[:, None]
        )


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the dtype in which autocast computes products, unchanged without it."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


def _fill(real: Tensor, x: Tensor, value: float) -> Tensor:
    """Set the padding frames of x [B, T/P, …] to a value; `where` also removes a NaN."""
    return torch.where(
        real.reshape(*real.shape, *[1] * (x.dim() - 2)), x, torch.full_like(x, value)
    )


class LocalSequence(GroupSequence):
    """Run the verbs for the whole clip on one device."""

    def __init__(self, layout: ClipLayout, kernels: Kernels = REFERENCE) -> None:
        super().__init__(layout, SoloComm(), kernels)

    def part(self, frames: FrameRange) -> SequenceShard:
        own = (self.layout, self.comm, self.kernels)
        return GroupSequence(*own, part=frames, recompute=self.recompute)

    def relaid(self, layout: ClipLayout) -> WholeClip:
        return LocalSequence(layout, self.kernels)


class SequenceMesh(Protocol):
    """Describe the part of a `parallel.mesh.Mesh` that `make_sequence` uses."""

    @property
    def comm(self) -> Communicator | None:
        """Return the sequence group's communicator; None when clips are not split."""
        ...


@cache
def _outside_graphs() -> type[GroupSequence]:
    """Return a GroupSequence for compiled models, whose graphs end before each verb.

    Collectives and their bookkeeping cannot be traced as tensor operations.
    """

    class OutsideGraphs(GroupSequence):
        attend = torch.compiler.disable(GroupSequence.attend)
        scan = torch.compiler.disable(GroupSequence.scan)
        halo = torch.compiler.disable(GroupSequence.halo)
        mean = torch.compiler.disable(GroupSequence.mean)
        gather = torch.compiler.disable(GroupSequence.gather)

    return OutsideGraphs


def make_sequence(
    layout: ClipLayout,
    mesh: SequenceMesh,
    kernels: Kernels = REFERENCE,
    engine: tuple[str, AttentionEngine] | None = None,
    compiled: bool = False,
    exchange: Exchange = "auto",
    recompute: Recompute = "answers",
) -> WholeClip:
    """Return this process's shard of a clip, or the whole clip if the mesh does not split clips.

    compiled: for a model under torch.compile.
    """
    kind = _outside_graphs() if compiled else GroupSequence
    if mesh.comm is None:
        return kind(layout, SoloComm(), kernels, recompute=recompute)
    return kind(layout, mesh.comm, kernels, engine, exchange=exchange, recompute=recompute)
