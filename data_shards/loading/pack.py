"""Pack several clips into one training sequence (Waypoint-1.5 §7.3).

Document starts tell the model where one clip ends and the next begins. Draws are cut into windows
of `draws_per_window`; the clips of a window are packed, by best fit, into exactly
`sequences_per_window` sequences of `capacity` latent frames. So sequence q depends on its window
alone, and a step finds its content without packing anything before it. Clips that do not fit into
their window are left out and counted, and so are empty frames: `report` shows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from data_shards.schema import DataError

C = TypeVar("C")


@dataclass(frozen=True)
class PackedSequence(Generic[C]):
    """Describe one packed sequence.

    `clips[i]` (from draw `draws[i]`) occupies the latent frames from `starts[i]`; frames from
    `valid_frames` on are padding.
    """

    draws: tuple[int, ...]
    clips: tuple[C, ...]
    starts: tuple[int, ...]
    valid_frames: int


@dataclass(frozen=True)
class PackingReport:
    """Summarise the sequences of some windows."""

    sequences: int
    packed_clips: int
    left_out_clips: int
    filled: float  # share of all latent frames that hold a clip


def best_fit(lengths: Sequence[int], capacity: int, bins: int) -> tuple[list[list[int]], list[int]]:
    """Put items into at most `bins` bins, longest first, each where it leaves the least room.

    Ties: the earliest bin and item. No bin stays empty while another has two. Returns (items of
    each bin in ascending order, items that fit nowhere).
    """
    room = [capacity] * bins
    contents: list[list[int]] = [[] for _ in range(bins)]
    left_out: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in range(bins) if room[b] >= lengths[item]]
        if not fitting:
            left_out.append(item)
            continue
        best = min(fitting, key=lambda b: (room[b], b))
        room[best] -= lengths[item]
        contents[best].append(item)
    for b in range(bins):
        if not contents[b]:  # a sequence of padding alone would be a wasted step
            fullest = max(range(bins), key=lambda other: (len(contents[other]), -other))
            if len(contents[fullest]) > 1:
                contents[b].append(contents[fullest].pop())
    return [sorted(items) for items in contents], sorted(left_out)


def plan_window(
    mean_length: float, capacity: int, sequences_per_window: int, fill: float = 0.96
) -> int:
    """Return the number of draws per window for which `fill` of its frames are used on average."""
    return max(
        sequences_per_window, math.floor(fill * capacity * sequences_per_window / mean_length)
    )


class Packer(Generic[C]):
    """Make sequences from a sample order, as a function of the sequence number alone.

    sample: draw -> clip; length: clip -> its latent frames; mean_length: of a draw, used to plan
    the number of draws in a window.
    """

    def __init__(
        self,
        sample: Callable[[int], C],
        length: Callable[[C], int],
        mean_length: float,
        capacity: int,
        sequences_per_window: int = 64,
    ) -> None:
        self.sample, self.length, self.capacity = sample, length, capacity
        self.sequences_per_window = sequences_per_window
        self.draws_per_window = plan_window(mean_length, capacity, sequences_per_window)
        self._window = lru_cache(maxsize=4)(self._pack_window)

    def sequence(self, number: int) -> PackedSequence[C]:
        window, slot = divmod(number, self.sequences_per_window)
        return self._window(window)[0][slot]

    def left_out(self, window: int) -> tuple[int, ...]:
        """Return the draws of a window that were left out."""
        return self._window(window)[1]

    def report(self, windows: int) -> PackingReport:
        """Return a report on the first windows."""
        sequences = [self.sequence(number) for number in range(windows * self.sequences_per_window)]
        filled = sum(sequence.valid_frames for sequence in sequences) / (
            len(sequences) * self.capacity
        )
        left_out = sum(len(self.left_out(window)) for window in range(windows))
        return PackingReport(
            len(sequences), sum(len(sequence.clips) for sequence in sequences), left_out, filled
        )

    def _pack_window(self, window: int) -> tuple[tuple[PackedSequence[C], ...], tuple[int, ...]]:
        first = window * self.draws_per_window
        clips = [self.sample(first + i) for i in range(self.draws_per_window)]
        lengths = [self.length(clip) for clip in clips]
        if not 0 < min(lengths) <= max(lengths) <= self.capacity:
            raise DataError(
                f"packing: got clips of {min(lengths)} to {max(lengths)} latent frames, expected 1"
                f" to {self.capacity}. Fix: cut them"
            )
        bins, left_out = best_fit(lengths, self.capacity, self.sequences_per_window)
        sequences = []
        for items in bins:
            starts, end = [], 0
            for item in items:
                starts.append(end)
                end += lengths[item]
            draws = tuple(first + item for item in items)
            sequences.append(
                PackedSequence(draws, tuple(clips[item] for item in items), tuple(starts), end)
            )
        return tuple(sequences), tuple(first + item for item in left_out)
