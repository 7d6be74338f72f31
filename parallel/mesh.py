"""The mesh: world = dp_replicate × dp_shard × ring × ulysses, ulysses fastest.

Ranks that exchange most sit next to each other: Ulysses groups first, then rings, then parameter shards, then replicas, so a launcher that
numbers the processes of a node consecutively places whole sequence groups inside nodes. The members of one sequence group (ring × ulysses)
share a clip and are numbered along time: member = ring index × ulysses + ulysses index. Parameters are sharded over dp_shard × ring ×
ulysses: inside a sequence group every process would otherwise hold the same parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm import Member
from parallel.layout import FrameRange, split_evenly
from parallel.process_group import ProcessGroupComm


class DegreesWanted(Protocol):
    """The `parallel` section of a run's configuration; None asks for the derived value."""

    @property
    def dp_replicate(self) -> int: ...
    @property
    def dp_shard(self) -> int | None: ...
    @property
    def cp(self) -> int: ...
    @property
    def ulysses(self) -> int | None: ...
    @property
    def ring(self) -> int | None: ...


@dataclass(frozen=True)
class Coordinate:
    dp_replicate: int
    dp_shard: int
    ring: int
    ulysses: int


@dataclass(frozen=True)
class MeshDegrees:
    """How many ways each thing is split."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        bad = {name: n for name, n in vars(self).items() if n < 1}
        if bad:
            raise ValueError(f"mesh is impossible: got {bad} in {self}, expected every degree >= 1 (key parallel)")

    @staticmethod
    def from_config(wanted: DegreesWanted, world: int, heads: int) -> MeshDegrees:
        """Fill in what is left open: ulysses = gcd(heads, cp), ring = cp / ulysses, dp_shard = what the other degrees leave of the
        world.
        """
        cp = wanted.cp
        if wanted.ulysses is None and wanted.ring is None:
            ulysses = math.gcd(heads, cp)
        else:
            ulysses = wanted.ulysses or max(1, cp // (wanted.ring or 1))
        ring = wanted.ring or max(1, cp // ulysses)
        if ring * ulysses != cp:
            raise ValueError(
                f"mesh is impossible: got ring {ring} x ulysses {ulysses}, expected cp {cp} (parallel.ring, parallel.ulysses, parallel.cp)."
                f" Fix: parallel.cp={ring * ulysses}"
            )
        fixed = max(1, wanted.dp_replicate * cp)
        degrees = MeshDegrees(wanted.dp_replicate, max(1, world // fixed) if wanted.dp_shard is None else wanted.dp_shard, ring, ulysses)
        degrees.check(world, heads)
        return degrees

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.ring * self.ulysses

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    def check(self, world: int, heads: int) -> None:
        """ValueError unless the product is the world and no Ulysses member is without heads."""
        text = f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x ring {self.ring} x ulysses {self.ulysses} = {self.world}"
        if self.world != world:
            inner = self.dp_replicate * self.cp
            fix = f"parallel.dp_shard={world // inner}" if world % inner == 0 else f"{self.world} processes (launcher.workers={self.world})"
            raise ValueError(f"mesh does not fit: got {text}, expected the number of processes, {world} (key parallel). Fix: {fix}")
        if self.ulysses > heads:
            valid = [n for n in range(1, heads + 1) if self.cp % n == 0]
            raise ValueError(
                f"mesh does not fit: got {text}, expected ulysses <= {heads} heads (key parallel.ulysses)."
                f" Fix: parallel.ulysses={valid[-1]} parallel.ring={self.cp // valid[-1]}"
            )

    def coordinate(self, rank: int) -> Coordinate:
        rest, ulysses = divmod(rank, self.ulysses)
        rest, ring = divmod(rest, self.ring)
        replicate, shard = divmod(rest, self.dp_shard)
        return Coordinate(replicate, shard, ring, ulysses)

    def rank(self, place: Coordinate) -> int:
        return ((place.dp_replicate * self.dp_shard + place.dp_shard) * self.ring + place.ring) * self.ulysses + place.ulysses

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of one axis ("sequence", "ulysses" or "ring"), each in member order."""
        if axis == "ring":
            starts = [r for r in range(self.world) if self.coordinate(r).ring == 0]
            return [[start + i * self.ulysses for i in range(self.ring)] for start in starts]
        size = self.ulysses if axis == "ulysses" else self.cp
        return [list(range(start, start + size)) for start in range(0, self.world, size)]


@dataclass(frozen=True)
class Mesh:
    """This process's place. comm is None when clips are not split."""

    degrees: MeshDegrees
    coordinate: Coordinate
    fsdp: DeviceMesh  # [dp_shard·cp], or [dp_replicate, dp_shard·cp]
    comm: ProcessGroupComm | None

    @property
    def data_size(self) -> int:
        """Number of data-parallel members: groups that see different clips."""
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def data_index(self) -> int:
        return self.coordinate.dp_replicate * self.degrees.dp_shard + self.coordinate.dp_shard

    @property
    def sequence_size(self) -> int:
        return self.degrees.cp

    @property
    def sequence_index(self) -> int:
        return self.coordinate.ring * self.degrees.ulysses + self.coordinate.ulysses

    def frames(self, latent_frames: int) -> FrameRange:
        """This process's latent frames of a clip of T; the rule of `ClipLayout.split`."""
        return split_evenly(latent_frames, self.sequence_size)[self.sequence_index]


def sequence_comm(member: Member, rank_groups: dict[str, list[list[int]]], timeout: timedelta | None = None) -> ProcessGroupComm:
    """Make the process groups of all sequence groups (every process must call this with the same lists) and join this process's own.

    rank_groups: per axis ("sequence", "ulysses", "ring") all groups as global ranks in member order; they need not be contiguous, but
    must ascend, because torch.distributed numbers the processes of a group that way.
    """
    unsorted = [ranks for lists in rank_groups.values() for ranks in lists if ranks != sorted(ranks)]
    if unsorted:
        raise ValueError(f"sequence groups are out of order: got {unsorted}, expected ascending ranks (sequence_comm). Fix: sort them")
    made: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}
    groups: dict[str, ProcessGroup] = {}
    for axis, lists in rank_groups.items():
        key = tuple(tuple(ranks) for ranks in lists)
        if key not in made:  # axes that coincide (ring 1, or ulysses 1) share a communicator
            for ranks in lists:
                group = dist.new_group(ranks, timeout=timeout)
                if dist.get_rank() in ranks:
                    made[key] = group
        groups[axis] = made[key]
    return ProcessGroupComm(member, groups)


def build_mesh(degrees: MeshDegrees, device_type: str, timeout: timedelta | None = None) -> Mesh:
    """The mesh of the initialised default process group. Every process calls it with the same degrees.

    timeout: how long a collective of the sequence groups may take (None: torch's default; new groups do not inherit the default group's).
    """
    degrees.check(dist.get_world_size(), degrees.ulysses)
    place = degrees.coordinate(dist.get_rank())
    inner = degrees.dp_shard * degrees.cp
    if degrees.dp_replicate > 1:
        fsdp = init_device_mesh(device_type, (degrees.dp_replicate, inner), mesh_dim_names=("dp_replicate", "dp_shard_cp"))
    else:
        fsdp = init_device_mesh(device_type, (inner,), mesh_dim_names=("dp_shard_cp",))
    comm = None
    if degrees.cp > 1:
        member = Member(place.ring, place.ulysses, degrees.ring, degrees.ulysses)
        axes = ["sequence", *(["ulysses"] if degrees.ulysses > 1 else []), *(["ring"] if degrees.ring > 1 else [])]
        comm = sequence_comm(member, {axis: degrees.groups(axis) for axis in axes}, timeout)
    return Mesh(degrees, place, fsdp, comm)
