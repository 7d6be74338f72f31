"""Run the verbs one chunk at a time, with the past in a state of constant size.

Source: SANA-WM §3.2, chunk-causal inference; §5.4. Frames interact only in the verbs of a
`SequenceShard`, so a streaming model is the same model with another view of the clip:
`StreamingSequence` covers the frames of one chunk, on one device or split over the ranks of any
shard, and takes the past from what earlier chunks stored. It stores per verb call, in the order of
the calls of a forward pass: the final states of a scan, the last frames of a convolution, and for
attention the keys and values that the mask lets a later frame see. States are complete on every
rank and never change; a pass makes a new one.

Attention has two kinds of past. Under a frame-causal mask that forgets (a window, frames pinned by
dilation) it is a ring: as many slots as frames can be of use, and a frame that comes takes the slot
of one that is forgotten; passes that do not remember see the slots as they are and copy nothing
(Waypoint-1.5 §5.1, where the frame under way has a slot of its own: here it is not stored). Under
other masks each chunk is a piece of its own, which the states of later chunks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.calls import Calls
from parallel.comm import Communicator
from parallel.gdn_scan import Reverse, ScanOutput
from parallel.halo import Taps
from parallel.layout import ClipLayout, FrameRange, single_frames
from parallel.masks import FULL, AttentionMask, needed, ring_slots
from parallel.reference import Kernels, Stream
from parallel.sequence import Cache, HaloEdges, Recompute, WholeClip, as_autocast


@dataclass(frozen=True)
class Past:
    """Store what one verb call must remember of earlier chunks, without gradients.

    tensors: states of a scan or frames of a convolution; keys: of attention, one piece per chunk,
    or one ring; ring: the mask by which a ring forgets.
    """

    tensors: tuple[Tensor, ...] = ()
    keys: tuple[Cache, ...] = ()
    ring: AttentionMask | None = None


@dataclass(frozen=True)
class StreamState:
    """Store everything that a rollout carries from chunk to chunk.

    frames: latent frames done. The empty state starts a video.
    """

    frames: int = 0
    calls: tuple[Past, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Return all stored tensors."""
        pairs = (x for past in self.calls for piece in past.keys for x in piece[:2])
        return [*(x for past in self.calls for x in past.tensors), *pairs]

    def elements(self) -> int:
        """Return the number of stored elements, over all calls."""
        return sum(x.numel() for x in self.tensors())


class StreamingSequence:
    """Run the verbs for the chunk that starts at `state.frames`, in one forward pass."""

    def __init__(self, clip: WholeClip, state: StreamState, remember: bool = True) -> None:
        """Store the view. clip: a shard of the whole clip, with its chunk starts; remember: store
        the chunk for `after`, at the cost of its keys and, over several ranks, of a gather.

        Raises ValueError for packed documents, padding, and a state that ends within a chunk.
        """
        layout = clip.layout
        single_frames(layout, "streaming")
        if layout.document_starts != (0,) or layout.ragged:
            raise ValueError(
                f"streaming failed: got documents {layout.document_starts} and valid_frames"
                f" {layout.valid_frames}, expected one document without padding"
                " (StreamingSequence). Fix: roll documents out one by one"
            )
        if state.frames not in layout.chunk_starts:
            raise ValueError(
                f"streaming failed: got a state after {state.frames} frames, expected a chunk"
                f" start of {layout.chunk_starts} (StreamingSequence). Fix: keep one layout for the"
                " whole rollout"
            )
        self.chunk = layout.chunk_of(state.frames)
        self._inner = clip.part(self.chunk)
        self._state, self._remember = state, remember
        self._kept: list[Past] = []
        self._calls = Calls()  # of this pass so far; a checkpointed function sets them back

    @property
    def layout(self) -> ClipLayout:
        return self._inner.layout

    @property
    def clip_frames(self) -> int:
        return self._inner.clip_frames

    @property
    def recompute(self) -> Recompute:
        return self._inner.recompute

    @property
    def comm(self) -> Communicator:
        return self._inner.comm

    @property
    def kernels(self) -> Kernels:
        return self._inner.kernels

    @property
    def frames(self) -> FrameRange:
        return self._inner.frames

    @property
    def positions(self) -> Tensor:
        return self._inner.positions

    def after(self) -> StreamState:
        """Return the state that includes this chunk; call it after the forward pass."""
        known = len(self._state.calls) if self._state.frames else len(self._kept)
        if not self._remember or known != len(self._kept):
            raise ValueError(
                f"streaming failed: got {len(self._kept)} stored verb calls, expected those of one"
                f" whole forward pass, {known} (StreamingSequence.after). Fix: a new"
                " StreamingSequence(clip, state) for each pass, with remember=True for this one"
            )
        return StreamState(self.chunk.stop, tuple(self._kept))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return attention over the visible frames, the chunk's own and earlier ones.

        q [B, t, S, H, D], k, v [B, t, S, H_kv, D] -> like q.
        """
        assert cache is None, "a stream has a cache of its own"
        if mask.causality == "full":
            self._no_future("full attention")
        q, k, v = as_autocast(q, k, v)
        pieces = self._past().keys
        seen = None
        if pieces:
            keys, values, frames = zip(*pieces, strict=True)
            seen = pieces[0]
            if len(pieces) > 1:
                seen = Cache(torch.cat(keys, dim=1), torch.cat(values, dim=1), sum(frames, ()))
        if self._remember:
            k_all, v_all = self._inner.gather([k, v])
            own = Cache(k_all, v_all, tuple(range(self.chunk.start, self.chunk.stop)))
            useful, slots = (
                needed(self.layout, mask, self.chunk.stop),
                ring_slots(self.layout, mask),
            )
            if slots is None:
                kept = (_chosen(piece, useful) for piece in (*pieces, own))
                self._store(Past(keys=tuple(piece for piece in kept if piece.frames)))
            else:
                self._store(Past(keys=(turned(seen, own, useful, slots),), ring=mask))
        return self._inner.attend(q, k, v, mask, seen)

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        """Continue the forward recurrence from the last chunk; reverse sees this chunk only."""
        assert initial is None, "a streaming scan has its own initial state"
        start = self._past().tensors or [
            stream.update.new_zeros(stream.update.shape[0], *stream.update.shape[2:])
            for stream in streams
        ]
        out = self._inner.scan(streams, reverse, start)
        if self._remember:
            self._store(Past(tuple(_owned(x) for x in out.final)))
        return out

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        """Return taps whose past comes from earlier chunks and whose future is zero."""
        if after and edges != "chunk":
            self._no_future(f"a convolution over edges={edges!r}")
        tails = self._past().tensors
        taps = self._inner.halo(tensors, before, after, edges)
        if tails:
            first = self.frames.start - self.chunk.start
            taps = [_joined(tap, tail, first) for tap, tail in zip(taps, tails, strict=True)]
        if self._remember:
            whole = self._inner.gather(tensors)
            if not tails:
                tails = tuple(x.new_zeros(x.shape[0], before, *x.shape[2:]) for x in whole)
            self._store(Past(tuple(_last(before, *pair) for pair in zip(tails, whole))))
        return taps

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean over this chunk."""
        return self._inner.mean(value, weight)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return all frames of this chunk."""
        return self._inner.gather(tensors)

    def rewind(self) -> AbstractContextManager[None]:
        return self._calls.rewind()

    def _past(self) -> Past:
        """Return what the same call of the last chunk's forward pass stored."""
        call, stored = self._calls.next(), self._state.calls
        if not self._state.frames:
            return Past()
        if call >= len(stored):
            raise ValueError(
                f"streaming failed: got verb call {call + 1}, expected {len(stored)} as in the pass"
                " over the chunk before (StreamingSequence). Fix: a new"
                " StreamingSequence(clip, state) for each forward pass of one model"
            )
        return stored[call]

    def _store(self, past: Past) -> None:
        """Store a call's past; a second run of a checkpointed function has stored it already."""
        if not self._calls.again:
            self._kept.append(past)

    def _no_future(self, what: str) -> None:
        """Raise ValueError if a later chunk follows, which a bidirectional model would see."""
        if self.layout.chunk_starts[-1] > self.chunk.start:
            raise ValueError(
                f"streaming failed: got {what} with chunks to come, expected a causal model, or the"
                " past would have to see the future (key model.causal). Fix: model.causal=true"
            )


def _owned(x: Tensor) -> Tensor:
    """Return x without its graph, in memory of its own size: a slice would keep the whole."""
    x = x.detach()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _chosen(piece: Cache, frames: frozenset[int]) -> Cache:
    """Return the keys and values of those frames of a piece, the piece itself if it is all."""
    places = [i for i, frame in enumerate(piece.frames) if frame in frames]
    keys, values = piece.keys, piece.values
    if 0 < len(places) < len(piece.frames):
        keys, values = (x[:, places] for x in (keys, values))
    return Cache(_owned(keys), _owned(values), tuple(piece.frames[i] for i in places))


def turned(ring: Cache | None, own: Cache, useful: frozenset[int], slots: int) -> Cache:
    """Return a ring of `slots` frames with a chunk's useful frames in the slots of frames that are
    of no use any more; the ring itself, its tensors unchanged, where the chunk has none."""
    frames, free = turned_frames(ring and ring.frames, own.frames, useful, slots)
    places = [place for place, frame in enumerate(own.frames) if frame in useful]

    def written(old: Tensor | None, mine: Tensor) -> Tensor:
        if old is not None and not places:
            return old
        empty = mine.new_zeros(mine.shape[0], slots, *mine.shape[2:])
        out = empty if old is None else old.clone()
        out[:, _run(free)] = mine[:, _run(places)].detach()
        return out

    keys = written(ring and ring.keys, own.keys)
    values = written(ring and ring.values, own.values)
    return Cache(keys, values, frames)


def turned_frames(
    ring: Sequence[int] | None, own: Sequence[int], useful: frozenset[int], slots: int
) -> tuple[tuple[int, ...], list[int]]:
    """Return the frames in the slots of `turned`'s ring, -1 in free ones, and the slots that a
    chunk's useful frames take."""
    new = [frame for frame in own if frame in useful]
    frames = [-1] * slots if ring is None else [f if f in useful else -1 for f in ring]
    taken = [slot for slot, frame in enumerate(frames) if frame < 0][: len(new)]
    for slot, frame in zip(taken, new, strict=True):
        frames[slot] = frame
    return tuple(frames), taken


def _run(places: list[int]) -> list[int] | slice:
    """Return places one after another as a slice: a list is copied to the device, which waits."""
    start = places[0] if places else 0
    run = slice(start, start + len(places))
    return run if places == list(range(run.start, run.stop)) else places


def _joined(taps: Taps, tail: Tensor, first: int) -> Taps:
    """Return taps with the past in place of the zeros before the chunk.

    tail: the frames before the chunk [B, before, …]; first: place of the first local frame in it.
    """
    missing = max(taps.before - first, 0)
    extended = torch.cat([tail[:, first : first + missing], taps.extended[:, missing:]], dim=1)
    return Taps(extended, taps.before, taps.frames, taps.seen)


def _last(count: int, before: Tensor, chunk: Tensor) -> Tensor:
    """Return the last `count` frames of a chunk and those before it, [B, count, …]."""
    joined = torch.cat([before, chunk], dim=1)
    return _owned(joined[:, joined.shape[1] - count :])


def chunk_starts(frames: int, chunk_frames: int) -> tuple[int, ...]:
    """Return the first frames of the chunks of a clip.

    The first chunk has one frame more (the image), as in the public layout `first_chunk_plus_one`:
    frames 11, chunk_frames 3 -> (0, 4, 7, 10). chunk_frames 0: one chunk, bidirectional.
    """
    return (0, *range(chunk_frames + 1, frames, chunk_frames)) if chunk_frames else (0,)
