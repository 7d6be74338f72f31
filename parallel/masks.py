"""Describe attention masks as data: the latent frames that a latent frame may attend to.

Every mask is frame-wise: the S tokens of one frame see the same frames. So a mask never becomes a
dense [T·S, T·S] matrix; `tiles` cuts it into dense rectangles (query frames × key frames) that any
unmasked attention kernel computes. Documents, padding and copies of frames come from the
`ClipLayout` and hold under every mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, NamedTuple

from parallel.layout import ClipLayout, FrameRange


@dataclass(frozen=True)
class AttentionMask:
    """Describe which frames a frame sees inside its document.

    - causality: full | frame (frames up to itself) | chunk (up to the end of its own chunk).
    - window: number of frames (frame) or chunks (chunk) back, its own included; None: all of the
      past.
    - sink: that many first frames of the document stay visible when the window has moved on.
    - dilation: frame only; beyond the window every `dilation`-th frame of the document stays
      visible …
    - reach: … as long as it is less than `reach` frames back (None: without end).
    """

    causality: Literal["full", "frame", "chunk"] = "full"
    window: int | None = None
    sink: int = 0
    dilation: int | None = None
    reach: int | None = None

    def __post_init__(self) -> None:
        if self.causality not in ("full", "frame", "chunk"):
            raise ValueError(
                f"attention mask is unknown: got causality={self.causality!r}, expected full, frame"
                " or chunk (AttentionMask)"
            )
        if self.causality == "full" and (self.window, self.sink, self.dilation, self.reach) != (
            None,
            0,
            None,
            None,
        ):
            raise ValueError(
                f"attention mask is impossible: got {self}, expected no window, sink, dilation or"
                " reach with causality='full'"
            )
        if self.causality == "chunk" and (self.dilation, self.reach) != (None, None):
            raise ValueError(
                f"attention mask is impossible: got {self}, expected dilation and reach only with"
                " causality='frame'"
            )
        if self.sink < 0 or any(
            n is not None and n < 1 for n in (self.window, self.dilation, self.reach)
        ):
            raise ValueError(
                f"attention mask is impossible: got {self}, expected window, dilation, reach >= 1"
                " and sink >= 0"
            )

    @property
    def late_frames_see_more(self) -> bool:
        """Return whether a frame sees the more, the later in its document it is, without a bound:
        then ranks that stay with their own queries have unequal work."""
        if self.causality == "full":
            return False
        return self.window is None or (self.dilation is not None and self.reach is None)


Runs = tuple[tuple[int, int], ...]  # (start, stop) of successive frames, ascending

FULL = AttentionMask()
FRAME_CAUSAL = AttentionMask("frame")
CHUNK_CAUSAL = AttentionMask("chunk")


class Tile(NamedTuple):
    """Describe a dense rectangle of attention.

    Frames count from the start of the query or key block. rows: batch rows it applies to (None:
    all). queries: (start, stop). keys: ascending (start, stop) runs, never empty. diagonal: each
    query frame sees one frame of the only run, in order, instead of all of it.

    Tiles may have queries in common, but then no keys: their results merge by log-sum-exp.
    """

    rows: tuple[int, ...] | None
    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    diagonal: bool = False


@lru_cache(maxsize=4096)
def visible(layout: ClipLayout, mask: AttentionMask, frame: int) -> frozenset[int]:
    """Return the frames that `frame` attends to, ignoring padding."""
    near, far = near_and_far(layout, mask, frame)
    return frozenset(near) | far


@lru_cache(maxsize=4096)
def near_and_far(
    layout: ClipLayout, mask: AttentionMask, frame: int
) -> tuple[range, frozenset[int]]:
    """Return the frames that `frame` attends to inside its window, and those outside of it; of a
    layout with copies, those of its own chunk in the window, and all others."""
    if layout.copies > 1:
        return _of_copies(layout, mask, frame)
    document = layout.document_of(frame)
    if mask.causality == "full":
        return range(document.start, document.stop), frozenset()
    if mask.causality == "frame":
        oldest = (
            document.start if mask.window is None else max(document.start, frame - mask.window + 1)
        )
        far = set(range(document.start, min(document.start + mask.sink, oldest)))
        if mask.dilation is not None:
            farthest = (
                document.start
                if mask.reach is None
                else max(document.start, frame - mask.reach + 1)
            )
            far |= {j for j in range(farthest, oldest) if (j - document.start) % mask.dilation == 0}
        return range(oldest, frame + 1), frozenset(far)
    chunks: list[FrameRange] = []
    cursor = document.start
    while cursor <= frame:
        chunks.append(layout.chunk_of(cursor))
        cursor = chunks[-1].stop
    oldest = (
        document.start if mask.window is None else chunks[max(0, len(chunks) - mask.window)].start
    )
    sink = range(document.start, min(document.start + mask.sink, oldest))
    return range(oldest, chunks[-1].stop), frozenset(sink)


def _of_copies(layout: ClipLayout, mask: AttentionMask, place: int) -> tuple[range, frozenset[int]]:
    """Return `near_and_far` of one copy of a frame: which frames the mask shows is decided as if
    each were there once; of them the own chunk's are of the same copy, all others clean."""
    n = layout.copies
    frame, copy = divmod(place, n)
    if layout.clean_given and copy == 0:
        return range(0), frozenset()
    once = single(layout)
    chunk = once.chunk_of(frame)
    near, far = near_and_far(once, mask, frame)
    start, stop = max(near.start, chunk.start), min(near.stop, chunk.stop)
    others = (frozenset(near) | far) - frozenset(range(start, stop))
    inside = range(chunk.start, chunk.stop)
    return range(n * start + copy, n * (stop - 1) + copy + 1, n), frozenset(
        n * i + (copy if i in inside else 0) for i in others
    )


@lru_cache(maxsize=256)
def single(layout: ClipLayout) -> ClipLayout:
    """Return the layout of the same clip with each frame once."""
    n, valid = layout.copies, layout.valid_frames
    return ClipLayout(
        layout.frames // n,
        tuple(i // n for i in layout.document_starts),
        tuple(i // n for i in layout.chunk_starts),
        None if valid is None else tuple(i // n for i in valid),
    )


def needed(layout: ClipLayout, mask: AttentionMask, frame: int) -> frozenset[int]:
    """Return the frames before `frame`, a chunk's first or the clip's end, that it or any later one
    attends to: a stream that arrives there keeps these.

    Under every causal mask a later frame sees of that past only what this one sees, so one answer
    serves all.
    """
    starts = tuple(start for start in layout.chunk_starts if start < frame)
    ahead = ClipLayout(frame + 1, layout.document_starts, (*starts, frame))
    return frozenset(i for i in visible(ahead, mask, frame) if i < frame)


@lru_cache(maxsize=256)
def ring_slots(layout: ClipLayout, mask: AttentionMask) -> int | None:
    """Return how many frames of the past a stream of this clip keeps at most, under a frame-causal
    mask that forgets; None under other masks, whose past grows or comes in whole chunks."""
    forgets = mask.window is not None and (mask.dilation is None or mask.reach is not None)
    if mask.causality != "frame" or not forgets:
        return None
    ends = (*layout.chunk_starts[1:], layout.frames)
    return max(len(needed(layout, mask, end)) for end in ends)


@lru_cache(maxsize=1024)
def cache_tiles(
    layout: ClipLayout, mask: AttentionMask, queries: FrameRange, cached: tuple[int, ...]
) -> tuple[Tile, ...]:
    """Cut the block of query frames × cached frames into rectangles; key j is frame cached[j].

    Both are frames of one clip, the cached ones in any order; -1 is an empty place.
    """
    return _cut(layout, mask, queries, cached)


def _rows_by_valid(layout: ClipLayout) -> list[tuple[tuple[int, ...] | None, int]]:
    """Group rows by their number of real frames -> [(rows, real frames)]."""
    if not layout.ragged:
        return [(None, layout.frames)]
    by_valid: dict[int, list[int]] = {}
    for row, valid in enumerate(layout.valid_frames or ()):
        by_valid.setdefault(valid, []).append(row)
    return [(tuple(rows), valid) for valid, rows in by_valid.items()]


@lru_cache(maxsize=1024)
def tiles(
    layout: ClipLayout, mask: AttentionMask, queries: FrameRange, keys: FrameRange
) -> tuple[Tile, ...]:
    """Cut one block (query frames × key frames) into rectangles.

    Query frames that are padding, or see no key of this block, are in no tile. Where frames see
    several runs outside of their windows (dilation), these make tiles of their own: neighbours
    share them, and in the windows' tiles they would have to be copied together for each frame.
    """
    return _cut(layout, mask, queries, range(keys.start, keys.stop))


def _cut(
    layout: ClipLayout, mask: AttentionMask, queries: FrameRange, keys: Sequence[int]
) -> tuple[Tile, ...]:
    """Cut query frames × these key frames into rectangles; key j is frame keys[j]."""
    found: list[Tile] = []
    for rows, valid in _rows_by_valid(layout):
        near, far, joint = {}, {}, {}
        for frame in range(queries.start, min(queries.stop, valid)):
            inside, outside = near_and_far(layout, mask, frame)
            near[frame], far[frame], joint[frame] = (
                _runs(seen, keys, valid) for seen in (inside, outside, {*inside, *outside})
            )
        # Each run is one view of the keys: only several of them have to be copied together. Clean
        # copies that neighbours share stand between others, so they are never one run.
        split = layout.copies > 1 or any(len(runs) > 1 for runs in far.values())
        for seen in (near, far) if split else (joint,):
            found += _rectangles(rows, seen, queries.start, keys)
    return tuple(found)


def _runs(seen: Collection[int], keys: Sequence[int], stop: int) -> Runs:
    """Return the runs of places in `keys` of the frames that are seen, before frame `stop`."""
    places = [j for j, key in enumerate(keys) if key in seen and key < stop]
    runs = [list(run) for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    return tuple((run[0][1], run[-1][1] + 1) for run in runs)


def _rectangles(
    rows: tuple[int, ...] | None, seen: Mapping[int, Runs], first: int, keys: Sequence[int]
) -> Iterator[Tile]:
    """Yield the tiles of successive frames that see the same runs, or each its own frame only.

    first: the first frame of the query block.
    """
    place = {key: j for j, key in enumerate(keys)}

    def kind(frame: int) -> Runs | None:
        own = place.get(frame)
        return None if own is not None and seen[frame] == ((own, own + 1),) else seen[frame]

    for runs, group in groupby(seen, kind):
        frames = list(group)
        span = (frames[0] - first, frames[-1] + 1 - first)
        if runs is None:
            own = (place[frames[0]], place[frames[-1]] + 1)
            yield Tile(rows, span, (own,), diagonal=len(frames) > 1)
        elif runs:
            yield Tile(rows, span, runs)
