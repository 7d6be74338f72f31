"""Resolve and check the degrees of the mesh: world = dp_replicate × dp_shard × ring × ulysses.

Pure integers and no torch, so the launch command, the planner, the parity command and the trainer
all call the same functions. Ulysses need not divide the heads: `ulysses.deal_heads` gives the first
ranks one head more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class DegreesWanted(Protocol):
    """Describe the `parallel` section of a run's configuration; None asks for the derived value."""

    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int | None: ...
    @property
    def cp(self) -> int | None: ...
    @property
    def ulysses(self) -> int | None: ...
    @property
    def ring(self) -> int | None: ...


@dataclass(frozen=True)
class DegreeProblem:
    """Describe one mistake: the key, its value, the rule, and the override that fixes it."""

    key: str
    got: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}: got {self.got}, expected {self.rule}. Fix: {self.fix}"


@dataclass(frozen=True)
class Coordinate:
    """Locate one process on the four axes of the mesh."""

    dp_replicate: int
    dp_shard: int
    ring: int
    ulysses: int


@dataclass(frozen=True)
class MeshDegrees:
    """Store the number of parts along each axis of the mesh."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        bad = {name: n for name, n in vars(self).items() if n < 1}
        if bad:
            raise ValueError(
                f"mesh is impossible: got {bad} in {self}, expected degrees >= 1 (key parallel)"
            )

    @staticmethod
    def from_config(
        wanted: DegreesWanted, world: int, heads: int, key_heads: int | None = None
    ) -> MeshDegrees:
        """Return the degrees, with dp_shard derived from the others if it is not given.

        world: number of processes; heads: attention heads; key_heads: of keys and values, None: as
        many. Raises ValueError with all of `degree_problems`.
        """
        problems = degree_problems(wanted, world, heads, key_heads)
        if problems:
            raise ValueError("\n".join(str(problem) for problem in problems))
        ring, ulysses = sequence_degrees(wanted, heads, key_heads)
        shards = wanted.dp_shard or world // (wanted.dp_replicate * ring * ulysses)
        return MeshDegrees(wanted.dp_replicate, shards, ring, ulysses)

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.ring * self.ulysses

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    def coordinate(self, rank: int) -> Coordinate:
        rest, ulysses = divmod(rank, self.ulysses)
        rest, ring = divmod(rest, self.ring)
        replicate, shard = divmod(rest, self.dp_shard)
        return Coordinate(replicate, shard, ring, ulysses)

    def rank(self, place: Coordinate) -> int:
        return (
            (place.dp_replicate * self.dp_shard + place.dp_shard) * self.ring + place.ring
        ) * self.ulysses + place.ulysses

    def groups(self, axis: str) -> list[list[int]]:
        """Return all groups of one axis ("sequence", "ulysses" or "ring"), each in rank order."""
        if axis == "ring":
            starts = [r for r in range(self.world) if self.coordinate(r).ring == 0]
            return [[start + i * self.ulysses for i in range(self.ring)] for start in starts]
        size = self.ulysses if axis == "ulysses" else self.cp
        return [list(range(start, start + size)) for start in range(0, self.world, size)]


def sequence_size(wanted: DegreesWanted) -> int:
    """Return the number of processes that share a clip: cp, or ulysses × ring where cp is None."""
    return wanted.cp if wanted.cp is not None else (wanted.ulysses or 1) * (wanted.ring or 1)


def sequence_degrees(
    wanted: DegreesWanted, heads: int, key_heads: int | None = None
) -> tuple[int, int]:
    """Return (ring, ulysses) with missing values derived; with none, ulysses = gcd(heads,
    key_heads, cp), as with more ranks than key heads each of these would be sent to several."""
    size = sequence_size(wanted)
    ulysses = wanted.ulysses or (
        max(1, size // wanted.ring) if wanted.ring else math.gcd(heads, key_heads or heads, size)
    )
    return wanted.ring or max(1, size // ulysses), ulysses


def degree_problems(
    wanted: DegreesWanted, world: int, heads: int, key_heads: int | None = None
) -> list[DegreeProblem]:
    """Return every reason why `world` processes cannot form this mesh; world, heads >= 1.

    Keys are those of the command line.
    """
    problems = degrees_below_one(wanted)
    if problems:
        return problems
    size = sequence_size(wanted)
    ring, ulysses = sequence_degrees(wanted, heads, key_heads)
    even = math.gcd(heads, key_heads or heads, size)
    if ring * ulysses != size:
        fix = f"parallel.cp=null, or parallel.ulysses={even} parallel.ring={size // even}"
        got = f"ring {ring} x ulysses {ulysses}"
        problems.append(
            DegreeProblem("parallel.ulysses", got, f"ulysses x ring = cp = {size}", fix)
        )
    elif ulysses > heads:
        most = max(n for n in divisors(size) if n <= heads)
        valid = ", ".join(str(n) for n in divisors(heads))
        rule = f"ulysses <= {heads} heads; {valid} share them evenly"
        fix = f"parallel.ulysses={most} parallel.ring={size // most}"
        problems.append(DegreeProblem("parallel.ulysses", f"ulysses {ulysses}", rule, fix))
    claimed = wanted.dp_replicate * size * (wanted.dp_shard or 1)
    if world == claimed or (wanted.dp_shard is None and world % claimed == 0):
        return problems
    if wanted.dp_shard is None and wanted.dp_replicate == 1:
        valid = ", ".join(str(degree) for degree in divisors(world))
        got = str(size) if wanted.cp is not None else f"{size} (ulysses x ring)"
        rule = f"a divisor of the {world} workers: {valid}"
        problems.append(DegreeProblem("parallel.cp", got, rule, f"launcher.workers={size}"))
        return problems
    shard = "dp_shard (free)" if wanted.dp_shard is None else f"dp_shard {wanted.dp_shard}"
    got = f"dp_replicate {wanted.dp_replicate} x {shard} x cp {size}"
    rest, left_over = divmod(world, wanted.dp_replicate * size)
    fix = f"launcher.workers={claimed}" + ("" if left_over else f", or parallel.dp_shard={rest}")
    problems.append(
        DegreeProblem("parallel", got, f"a product that makes the {world} workers", fix)
    )
    return problems


def degrees_below_one(wanted: DegreesWanted) -> list[DegreeProblem]:
    """Return a problem for each degree below 1."""
    given = {
        key: getattr(wanted, key) for key in ("dp_replicate", "dp_shard", "cp", "ulysses", "ring")
    }
    return [
        DegreeProblem(f"parallel.{key}", str(value), "a whole number from 1", f"parallel.{key}=1")
        for key, value in given.items()
        if value is not None and value < 1
    ]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number` up to 4096, in ascending order."""
    return [degree for degree in range(1, min(number, 4096) + 1) if number % degree == 0]
