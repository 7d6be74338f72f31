"""Which clip a draw takes: a keyed permutation of the index, computed per element, so no list of a billion numbers exists anywhere.

A *draw* is a position in a stage's global sample stream: step s of a stage with global batch G takes draws s*G … s*G + G - 1. The clip
of a draw is a function of (seed, stage, draw) alone; world size, workers and context-parallel degree never enter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from data_shards.schema import DataError

ROUNDS = 6
MASK64 = 2**64 - 1


def mix64(value: int) -> int:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def derive_key(*parts: int | str) -> int:
    """64 bits from any integers and names, the same on every machine (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: int, length: int, key: int) -> int:
    """The image of `index` under the permutation of range(length) that `key` selects.

    A Feistel network permutes the smallest range of 2^(2k) numbers that holds `length`; results outside are fed back until one lies inside
    ("cycle walking", fewer than 4 rounds on average), which keeps it a permutation.
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
    """Endless epochs over `length` clips; each epoch is its own permutation. The only state is the draw number."""

    length: int
    seed: int
    stage_index: int
    _key: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError(f"sample order: got {self.length} clips, expected at least 1. Fix: encode clips into this split")
        object.__setattr__(self, "_key", derive_key("order", self.seed, self.stage_index))

    def sample(self, draw: int) -> int:
        """The clip (0 … length-1) of this draw."""
        epoch, position = divmod(draw, self.length)
        return permute(position, self.length, mix64(self._key ^ mix64(epoch)))

    def replacement(self, draw: int, attempt: int) -> int:
        """The clip to take instead when that of `draw` lies in a quarantined shard: a keyed draw of its own, so nothing else moves."""
        return mix64(self._key ^ mix64(draw) ^ mix64(derive_key("replacement", attempt))) % self.length

    def batch(self, step: int, global_batch: int, rows: range) -> tuple[int, ...]:
        """The draws of the given rows of a step's global batch."""
        if rows and not (rows[0] >= 0 and rows[-1] < global_batch):
            raise DataError(f"batch rows: got {rows}, expected rows of a global batch of {global_batch}")
        return tuple(step * global_batch + row for row in rows)
