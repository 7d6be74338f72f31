"""Plan the rows of every step of a stage: which clips, cut where and how long.

A function of (clips, seed, stage, step) alone, computed without counting from the start. First
comes the step's bucket, that is its (frames, height, width), then for each row a draw from the
mixture of data sets in that bucket. Or, packed, sequences of several clips, each window of draws by
itself (`pack`). World size, workers and the context-parallel degree never matter; `shares` assigns
rows to ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data_shards.loading.order import MixtureOrder, WeightedChoice, derive_key, mix64
from data_shards.loading.pack import Packer, PackingReport
from data_shards.schema import DataError

ATTEMPTS = 10_000  # to find a clip outside the quarantined shards


class Take(NamedTuple):
    """Describe a cut: `frames` latent frames of a clip from its latent `start` on.

    clip: its number in its data set's split.
    """

    source: int
    clip: int
    start: int
    frames: int


@dataclass(frozen=True)
class Row:
    """Describe one row of a global batch.

    draw: its position in the stage's sample stream, which keys all randomness; takes: its clips one
    after another, more than one only when packed; frames: T of the row, padding included.
    """

    draw: int
    takes: tuple[Take, ...]
    frames: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first latent frame of each clip in the row."""
        ends = np.cumsum([take.frames for take in self.takes]).tolist()
        return (0, *ends[:-1])

    @property
    def valid_frames(self) -> int:
        return sum(take.frames for take in self.takes)


@dataclass(frozen=True)
class Source:
    """Describe a data set to the schedule.

    T of each clip of the split, its weight in the mixture, (height, width) of its latents, and the
    spacing in latent frames of possible cut starts (0: at the clip's start only).
    """

    latent_frames: NDArray[np.int64]
    weight: float
    size: tuple[int, int]
    cut_every: int = 0


@dataclass(frozen=True)
class _Bucket:
    frames: int
    sources: tuple[int, ...]
    clips: tuple[Sequence[int], ...]  # of each source: the numbers of its clips in this bucket
    order: MixtureOrder


class Schedule:
    """Plan the global batches of one stage.

    lengths: the latent frames that a cut may have; each clip is cut to the longest that it can
    fill, and a step's clips all have the same. pack: rows of max(lengths) latent frames are filled
    with whole clips instead; all data sets must have one picture size.

    Raises:
        DataError: no clips, or one shorter than all lengths.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        lengths: Sequence[int],
        seed: int,
        stage: str,
        global_batch: int,
        pack: bool = False,
    ) -> None:
        self.sources, self.global_batch, self.frames = tuple(sources), global_batch, max(lengths)
        self._key = derive_key("cut", seed, stage)
        self._buckets = _buckets(
            self.sources, (self.frames,) if pack else tuple(sorted(set(lengths))), seed, stage, pack
        )
        shares = [sum(bucket.order.weights) for bucket in self._buckets]
        self._choice = WeightedChoice(tuple(shares), derive_key("bucket", seed), stage)
        self._packer: Packer[tuple[int, int]] | None = None
        if pack:
            (bucket,) = self._buckets
            weights = [source.weight for source in self.sources]
            mean = np.average(
                [np.minimum(source.latent_frames, self.frames).mean() for source in self.sources],
                weights=weights,
            )
            self._packer = Packer(
                bucket.order.sample,
                lambda pick: self._length(bucket, pick),
                float(mean),
                self.frames,
            )

    def rows(
        self,
        step: int,
        wanted: Sequence[int],
        quarantined: Callable[[int, int], bool] | None = None,
    ) -> tuple[Row, ...]:
        """Return these rows of a step's global batch.

        quarantined(source, clip): True if a clip must not be read; another, drawn by a key of its
        own, replaces it, so no other row changes.
        """
        number, position = self._choice.choose(step)
        bucket = self._buckets[number]
        return tuple(
            self._row(
                bucket,
                step * self.global_batch + row,
                position * self.global_batch + row,
                quarantined,
            )
            for row in wanted
        )

    def packing(self, windows: int = 4) -> PackingReport | None:
        """Return a packing report on the first windows; None without packing."""
        return self._packer.report(windows) if self._packer else None

    def _row(
        self, bucket: _Bucket, draw: int, place: int, quarantined: Callable[[int, int], bool] | None
    ) -> Row:
        """Return one row. place: its position in its bucket's own stream."""
        if self._packer is None:
            picks, draws, lengths = [bucket.order.sample(place)], [place], [bucket.frames]
        else:
            packed = self._packer.sequence(place)
            picks, draws = list(packed.clips), list(packed.draws)
            lengths = [self._length(bucket, pick) for pick in picks]
        takes = []
        for pick, own, length in zip(picks, draws, lengths, strict=True):
            clip = self._good(bucket, pick, own, length, quarantined)
            takes.append(self._cut(bucket, clip, own, length))
        return Row(draw, tuple(takes), bucket.frames)

    def _good(
        self,
        bucket: _Bucket,
        pick: tuple[int, int],
        draw: int,
        length: int,
        quarantined: Callable[[int, int], bool] | None,
    ) -> tuple[int, int]:
        if quarantined is None or not quarantined(*self._clip(bucket, pick)):
            return pick
        for attempt in range(ATTEMPTS):
            other = bucket.order.replacement(draw, attempt)
            source, clip = self._clip(bucket, other)
            if self.sources[source].latent_frames[clip] >= length and not quarantined(source, clip):
                return other
        raise DataError(
            f"quarantine: got no clip of {length} latent frames outside the quarantined shards in"
            f" {ATTEMPTS} draws, expected clips left. Fix: mend the shards (`python -m"
            " data_shards.verify` lists the damage)"
        )

    def _cut(self, bucket: _Bucket, pick: tuple[int, int], draw: int, length: int) -> Take:
        """Return this draw's cut: at latent 0 or, in a longer clip, perhaps at an image latent."""
        number, clip = self._clip(bucket, pick)
        source = self.sources[number]
        places = (
            1 + (int(source.latent_frames[clip]) - length) // source.cut_every
            if source.cut_every
            else 1
        )
        start = mix64(self._key ^ mix64(draw)) % places * source.cut_every
        return Take(number, clip, start, length)

    def _clip(self, bucket: _Bucket, pick: tuple[int, int]) -> tuple[int, int]:
        """Map (place in the bucket's mixture, position in that) -> (data set, clip)."""
        return bucket.sources[pick[0]], int(bucket.clips[pick[0]][pick[1]])

    def _length(self, bucket: _Bucket, pick: tuple[int, int]) -> int:
        source, clip = self._clip(bucket, pick)
        return min(int(self.sources[source].latent_frames[clip]), self.frames)


def _buckets(
    sources: tuple[Source, ...], lengths: tuple[int, ...], seed: int, stage: str, pack: bool
) -> tuple[_Bucket, ...]:
    """Group clips by (frames, height, width).

    A mixture's weights hold over all buckets together.
    """
    edges = np.array(lengths)
    members: dict[tuple[int, tuple[int, int]], dict[int, Sequence[int]]] = {}
    for number, source in enumerate(sources):
        if not len(source.latent_frames):
            raise DataError(
                f"data: got an empty split in data set {number}, expected clips. Fix: encode more"
                " episodes"
            )
        if pack:
            members.setdefault((lengths[0], source.size), {})[number] = range(
                len(source.latent_frames)
            )
            continue
        shortest = int(source.latent_frames.argmin())
        if source.latent_frames[shortest] < edges[0]:
            raise ShortClip(number, shortest, int(source.latent_frames[shortest]), int(edges[0]))
        which = np.searchsorted(edges, source.latent_frames, side="right") - 1
        for i, frames in enumerate(lengths):
            numbers = np.flatnonzero(which == i)
            if len(numbers) == len(which):
                # no list of a billion numbers
                members.setdefault((frames, source.size), {})[number] = range(len(which))
            elif len(numbers):
                members.setdefault((frames, source.size), {})[number] = cast(Sequence[int], numbers)
    if pack and len(members) > 1:
        raise DataError(
            f"packing: got latents of {sorted(size for _, size in members)}, expected one size."
            " Fix: data.pack=false"
        )
    found = []
    for place, ((frames, _), clips) in enumerate(sorted(members.items())):
        weights = tuple(
            sources[n].weight * len(clips[n]) / len(sources[n].latent_frames) for n in clips
        )
        own = seed if place == 0 else derive_key("bucket", seed, place)
        order = MixtureOrder(tuple(map(len, clips.values())), weights, own, stage)
        found.append(_Bucket(frames, tuple(clips), tuple(clips.values()), order))
    return tuple(found)


class ShortClip(DataError):
    """Report a clip shorter than every cut; the loader adds the clip's name."""

    def __init__(self, source: int, clip: int, frames: int, wanted: int) -> None:
        super().__init__(
            f"clip length: got {frames} latent frames in clip {clip} of data set {source}, expected"
            f" {wanted}"
        )
        self.source, self.clip, self.frames, self.wanted = source, clip, frames, wanted


def shares(costs: Sequence[float], members: int) -> tuple[tuple[int, ...], ...]:
    """Assign rows to data-parallel ranks: equally many each, of nearly equal total cost.

    The costliest rows are assigned first, to the rank with the lowest cost so far. Rows of one cost
    are assigned in order, so batches of one shape stay contiguous ranges.
    """
    each = len(costs) // members
    if len(set(costs)) <= 1:
        return tuple(tuple(range(m * each, (m + 1) * each)) for m in range(members))
    loads = [0.0] * members
    taken: list[list[int]] = [[] for _ in range(members)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        member = min(
            (m for m in range(members) if len(taken[m]) < each), key=lambda m: (loads[m], m)
        )
        taken[member].append(row)
        loads[member] += costs[row]
    return tuple(tuple(sorted(rows)) for rows in taken)
