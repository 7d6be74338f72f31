"""Assign latent frames to ranks, and decide which frame may see which: pure integers, no tensors.

One clip (or several documents packed into one sequence) has T latent frames. `edges` is the only
place that knows where information may cross from one frame to the next; the GDN scan, the
convolution halos, the attention masks and streaming all call it, and so do the oracles of their
tests.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class FrameRange:
    """Represent latent frames start, start+1, …, stop-1. May be empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(
                f"frame range is impossible: got [{self.start}, {self.stop}), expected 0 <= start"
                " <= stop (FrameRange)"
            )

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ClipLayout:
    """Describe the time axis of a batch, equal on every rank.

    - frames: T, latent frames per row (padding included).
    - document_starts: first frame of each packed document. Nothing ever crosses a document edge.
    - chunk_starts: first frame of each chunk. A chunk sees the past and itself, never a later
      chunk. The default is one chunk: bidirectional.
    - valid_frames: per row, the number of leading frames that are real; the rest is padding that
      changes no real frame. None: all of them, any row count.
    - copies: n, each frame stands n times in a row, its copies one after the other; T and all of
      the above count every copy. Copy 0 is clean and sees clean frames; copy c >= 1 is noisy and
      sees copy c of its own chunk's frames and copy 0 of all others (packed teacher forcing,
      Waypoint-1.5 §4). A layout with copies has attention and means, no scans and no halos.
    - clean_given: copy 0 is only seen: what it sees itself is not computed and gives zeros.
    - time_ids: per frame its time index, where frames are a choice from a longer clip, in any order
      and some more than once (MoWorld §4.2). None: frames count from their document's first.
    """

    frames: int
    document_starts: tuple[int, ...] = (0,)
    chunk_starts: tuple[int, ...] = (0,)
    valid_frames: tuple[int, ...] | None = None
    copies: int = 1
    clean_given: bool = False
    time_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(
                f"clip layout has no frames: got frames={self.frames}, expected >= 1 (ClipLayout)"
            )
        for name in ("document_starts", "chunk_starts"):
            starts = tuple(getattr(self, name))
            object.__setattr__(self, name, starts)
            if (
                not starts
                or starts[0] != 0
                or any(b <= a for a, b in pairwise(starts))
                or starts[-1] >= self.frames
            ):
                raise ValueError(
                    f"clip layout is impossible: got {name}={starts}, expected 0 = first < … < last"
                    f" < frames={self.frames} (ClipLayout)"
                )
        if self.valid_frames is not None:
            object.__setattr__(self, "valid_frames", tuple(int(n) for n in self.valid_frames))
            bad = [n for n in self.valid_frames if not 0 <= n <= self.frames]
            if bad:
                raise ValueError(
                    f"clip layout is impossible: got valid_frames {bad}, expected 0 …"
                    f" frames={self.frames} (ClipLayout)"
                )
        counts = (self.frames, *self.document_starts, *self.chunk_starts)
        if self.copies < 1 or any(n % self.copies for n in (*counts, *(self.valid_frames or ()))):
            raise ValueError(
                f"clip layout is impossible: got copies={self.copies} with {self}, expected >= 1"
                " and all counts multiples of it (ClipLayout.copied)"
            )
        if self.time_ids is not None:
            ids = tuple(int(i) for i in self.time_ids)
            object.__setattr__(self, "time_ids", ids)
            if len(ids) != self.frames or min(ids) < 0:
                raise ValueError(
                    f"clip layout is impossible: got time_ids {ids}, expected {self.frames} indices"
                    " from 0, one per frame (ClipLayout)"
                )

    def copied(self, copies: int, clean_given: bool = False) -> ClipLayout:
        """Return the layout of the same frames, each of them `copies` times in succession."""
        if self.copies > 1:
            raise ValueError(
                f"cannot copy frames: got a layout with {self.copies} copies, expected single"
                " frames (ClipLayout.copied)"
            )

        def scaled(counts: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(copies * n for n in counts)

        valid = None if self.valid_frames is None else scaled(self.valid_frames)
        starts = (scaled(self.document_starts), scaled(self.chunk_starts))
        ids = self.time_ids and tuple(i for i in self.time_ids for _ in range(copies))
        return ClipLayout(copies * self.frames, *starts, valid, copies, clean_given, ids)

    def split(self, ranks: int) -> tuple[FrameRange, ...]:
        """Return contiguous shards in rank order.

        The first T % P ranks get one frame more, and ranks beyond T get none. Copies of a frame
        stay together: they are split as if each were one.
        """
        if ranks < 1:
            raise ValueError(
                f"cannot split a clip: got {ranks} ranks, expected >= 1 (ClipLayout.split)"
            )
        shards = _split(self.frames // self.copies, ranks)
        return tuple(FrameRange(r.start * self.copies, r.stop * self.copies) for r in shards)

    @property
    def ragged(self) -> bool:
        """Return True if any row has padding frames."""
        return self.valid_frames is not None and any(n < self.frames for n in self.valid_frames)

    def document_of(self, frame: int) -> FrameRange:
        """Return the document that contains a frame."""
        return _span(self.document_starts, self.frames, frame)

    def cut(self, frames: FrameRange) -> ClipLayout:
        """Return the layout of these frames alone, counted from 0; nothing crosses their ends."""

        def starts(of: tuple[int, ...]) -> tuple[int, ...]:
            return (0, *(i - frames.start for i in of if frames.start < i < frames.stop))

        valid = self.valid_frames
        if valid is not None:
            valid = tuple(min(max(n - frames.start, 0), len(frames)) for n in valid)
        return ClipLayout(
            len(frames),
            starts(self.document_starts),
            starts(self.chunk_starts),
            valid,
            self.copies,
            self.clean_given,
            self.time_ids and self.time_ids[frames.start : frames.stop],
        )

    def chunk_of(self, frame: int) -> FrameRange:
        """Return the chunk that contains a frame; a document edge ends a chunk as well."""
        return _span(_merged(self), self.frames, frame)

    def position_of(self, frame: int) -> int:
        """Return the time index of a frame: its own one, or inside its document, where copies of a
        frame have the same."""
        if self.time_ids is not None:
            return self.time_ids[frame]
        return (frame - self.document_of(frame).start) // self.copies


@lru_cache(maxsize=256)
def _split(count: int, parts: int) -> tuple[FrameRange, ...]:
    small, larger = divmod(count, parts)
    bounds = [part * small + min(part, larger) for part in range(parts + 1)]
    return tuple(FrameRange(a, b) for a, b in pairwise(bounds))


def split_evenly(count: int, parts: int) -> tuple[FrameRange, ...]:
    """Split `count` items (frames, attention heads) by the rule of `ClipLayout.split`."""
    return _split(count, parts)


def _span(starts: tuple[int, ...], end: int, frame: int) -> FrameRange:
    index = bisect_right(starts, frame) - 1
    return FrameRange(starts[index], starts[index + 1] if index + 1 < len(starts) else end)


@lru_cache(maxsize=256)
def _merged(layout: ClipLayout) -> tuple[int, ...]:
    return tuple(sorted({*layout.document_starts, *layout.chunk_starts}))


def single_frames(layout: ClipLayout, what: str) -> None:
    """Raise ValueError if a frame stands in the layout more than once."""
    if layout.copies > 1:
        raise ValueError(
            f"{what} failed: got {layout.copies} copies of each frame, expected single frames, as"
            " only attention tells copies apart (ClipLayout.copies). Fix: a model whose frames meet"
            " in attention alone"
        )


@lru_cache(maxsize=256)
def edges(layout: ClipLayout, direction: Direction) -> tuple[bool, ...]:
    """Return the open edges of a clip, T+1 of them; edge i lies between frame i-1 and frame i.

    - forward: may frame i see frame i-1? Not at a document's first frame.
    - reverse: may frame i-1 see frame i? Neither at a document's nor at a chunk's first frame.

    Edges 0 and T are the clip's ends and closed (a scan that continues a stream opens edge 0
    itself). Copies of a frame have no order in time, so a layout with copies has no edges:
    ValueError.
    """
    single_frames(layout, "a scan")
    cuts = layout.document_starts if direction == "forward" else _merged(layout)
    closed = {0, layout.frames, *cuts}
    return tuple(edge not in closed for edge in range(layout.frames + 1))


@lru_cache(maxsize=256)
def halo_limits(layout: ClipLayout, kind: str) -> tuple[FrameRange, ...]:
    """Return for each frame the range that a temporal convolution may read.

    - clip: everything.
    - document: its own document.
    - chunk: from its document's start to its chunk's end (the past is visible, the future is not).
    """
    if kind not in ("clip", "document", "chunk"):
        raise ValueError(
            f"halo edges are unknown: got {kind!r}, expected clip, document or chunk"
            " (SequenceShard.halo)"
        )
    single_frames(layout, "a convolution over time")
    if kind == "clip":
        return (FrameRange(0, layout.frames),) * layout.frames
    end = layout.document_of if kind == "document" else layout.chunk_of
    return tuple(FrameRange(layout.document_of(i).start, end(i).stop) for i in range(layout.frames))
