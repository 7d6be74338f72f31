"""Map draws to clips by a keyed permutation, computed per element without a list of the index.

A *draw* is a position in a stage's global sample stream: step s of a stage with global batch G
takes draws s*G … s*G + G - 1. The clip of a draw is a function of (seed, stage name, draw) alone;
world size, workers and context-parallel degree never matter.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from dataclasses import dataclass, field

from data_shards.schema import DataError

ROUNDS = 6
MASK64 = 2**64 - 1


def mix64(value: int) -> int:
    """Mix 64 bits with splitmix64's finaliser.

    It is a bijection in which every input bit changes every output bit with probability one half.
    """
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def derive_key(*parts: int | str) -> int:
    """Return 64 bits from any integers and names, the same on every machine.

    Python's own hash is not.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: int, length: int, key: int) -> int:
    """Return the image of `index` under the permutation of range(length) that `key` selects.

    A Feistel network permutes the smallest range of 2^(2k) numbers that contains `length`; results
    outside are fed back until one is inside ("cycle walking", fewer than 4 rounds on average),
    which keeps it a permutation.
    """
    if not 0 <= index < length:
        raise DataError(f"sample order: got index {index}, expected 0 to {length - 1}")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for r in range(ROUNDS):
            left, right = right, left ^ (mix64(key ^ mix64((r << 56) ^ right)) & mask)
        index = (left << half) | right
        if index < length:
            return index


@dataclass(frozen=True)
class SampleOrder:
    """Order `length` clips in endless epochs, each its own permutation.

    The only state is the draw number.
    """

    length: int
    seed: int
    stage: str
    _key: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError(
                f"sample order: got {self.length} clips, expected at least 1. Fix: encode clips"
                " into this split"
            )
        object.__setattr__(self, "_key", derive_key("order", self.seed, self.stage))

    def sample(self, draw: int) -> int:
        """Return the clip (0 … length-1) of this draw."""
        epoch, position = divmod(draw, self.length)
        return permute(position, self.length, mix64(self._key ^ mix64(epoch)))

    def replacement(self, draw: int, attempt: int) -> int:
        """Return the clip to take instead when that of `draw` is in a quarantined shard.

        It has a key of its own, so no other draw changes.
        """
        return (
            mix64(self._key ^ mix64(draw) ^ mix64(derive_key("replacement", attempt))) % self.length
        )

    def batch(self, step: int, global_batch: int, rows: range) -> tuple[int, ...]:
        """Return the draws of the given rows of a step's global batch."""
        if rows and not (rows[0] >= 0 and rows[-1] < global_batch):
            raise DataError(
                f"batch rows: got {rows}, expected rows of a global batch of {global_batch}"
            )
        return tuple(step * global_batch + row for row in rows)


@dataclass(frozen=True)
class WeightedChoice:
    """Choose a stream for each position, in exact proportion, and the position inside that stream.

    Positions are cut into windows of `window`. Each window gives every stream a fixed number of
    places (its weight, by largest remainder) and permutes the places by key. So position ->
    (stream, position in it) is computed without counting, and each stream is consumed without gap
    or repetition.
    """

    weights: tuple[float, ...]
    seed: int
    stage: str
    window: int | None = None  # None: large enough that the smallest weight has some places
    _window: int = field(init=False, repr=False)
    _ends: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.weights or not all(
            math.isfinite(weight) and weight > 0 for weight in self.weights
        ):
            raise DataError(
                f"mixture weights: got {self.weights}, expected positive numbers. Fix: leave out"
                " what has no weight"
            )
        total = sum(self.weights)
        window = self.window or max(1000, math.ceil(10 * total / min(self.weights)))
        object.__setattr__(self, "_window", window)
        exact = [weight / total * window for weight in self.weights]
        shares = [math.floor(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
        for i in by_remainder[: window - sum(shares)]:
            shares[i] += 1
        if 0 in shares:
            raise DataError(
                f"mixture weights: got {self.weights}, of which number {shares.index(0)} has no"
                f" place in a window of {window}. Fix:"
                f" window={math.ceil(2 * total / min(self.weights))}"
            )
        object.__setattr__(self, "_ends", tuple(itertools.accumulate(shares)))

    @property
    def shares(self) -> tuple[int, ...]:
        """Return the places of each stream in a window."""
        return tuple(end - start for start, end in zip((0, *self._ends), self._ends))

    def choose(self, position: int) -> tuple[int, int]:
        """Return (stream, position in that stream)."""
        if len(self.weights) == 1:
            return 0, position
        window, place = divmod(position, self._window)
        place = permute(
            place, self._window, mix64(derive_key("mixture", self.seed, self.stage) ^ mix64(window))
        )
        stream = bisect.bisect_right(self._ends, place)
        start = self._ends[stream - 1] if stream else 0
        return stream, window * (self._ends[stream] - start) + place - start


@dataclass(frozen=True)
class MixtureOrder:
    """Draw from several data sets by weight; each keeps its own epochs.

    With one data set it is `SampleOrder`.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    stage: str
    window: int | None = None
    _choice: WeightedChoice = field(init=False, repr=False)
    _orders: tuple[SampleOrder, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.weights):
            raise DataError(
                f"mixture: got {len(self.lengths)} data sets and {len(self.weights)} weights,"
                " expected one each"
            )
        object.__setattr__(
            self, "_choice", WeightedChoice(self.weights, self.seed, self.stage, self.window)
        )
        seeds = (
            self.seed,
            *(derive_key("data set", self.seed, i) for i in range(1, len(self.lengths))),
        )
        object.__setattr__(
            self,
            "_orders",
            tuple(SampleOrder(n, s, self.stage) for n, s in zip(self.lengths, seeds, strict=True)),
        )

    def sample(self, draw: int) -> tuple[int, int]:
        """Return (data set, clip) of this draw."""
        dataset, position = self._choice.choose(draw)
        return dataset, self._orders[dataset].sample(position)

    def replacement(self, draw: int, attempt: int) -> tuple[int, int]:
        """Return the (data set, clip) to take instead when that of `draw` may not be read.

        It is of the same data set, so the weights hold.
        """
        dataset, position = self._choice.choose(draw)
        return dataset, self._orders[dataset].replacement(position, attempt)
