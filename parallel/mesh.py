"""Build the mesh: world = dp_replicate × dp_shard × ring × ulysses, ulysses fastest.

Ranks that exchange most are neighbours: Ulysses groups first, then rings, then parameter shards,
then replicas, so a launcher that numbers the processes of a node consecutively places whole
sequence groups inside nodes. The ranks of one sequence group (ring × ulysses) share a clip and are
numbered along time: index = ring index × ulysses + ulysses index. Parameters are sharded over
dp_shard × ring × ulysses, as the processes of a sequence group would otherwise all store the same
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm import Member
from parallel.degrees import Coordinate, MeshDegrees
from parallel.layout import FrameRange, split_evenly
from parallel.process_group import ProcessGroupComm


@dataclass(frozen=True)
class Mesh:
    """Locate this process in the mesh. comm is None when clips are not split."""

    degrees: MeshDegrees
    coordinate: Coordinate
    fsdp: DeviceMesh  # [dp_shard·cp], or [dp_replicate, dp_shard·cp]
    comm: ProcessGroupComm | None

    @property
    def data_size(self) -> int:
        """Return the number of data-parallel groups, which see different clips."""
        return self.degrees.dp_replicate * self.degrees.dp_shard

    @property
    def data_index(self) -> int:
        """Return the index of this process's data-parallel group."""
        return self.coordinate.dp_replicate * self.degrees.dp_shard + self.coordinate.dp_shard

    @property
    def sequence_size(self) -> int:
        """Return the number of ranks that share a clip."""
        return self.degrees.cp

    @property
    def sequence_index(self) -> int:
        """Return this process's index in its sequence group, along time."""
        return self.coordinate.ring * self.degrees.ulysses + self.coordinate.ulysses

    def frames(self, latent_frames: int) -> FrameRange:
        """Return this process's latent frames of a clip of T, by `ClipLayout.split`'s rule."""
        return split_evenly(latent_frames, self.sequence_size)[self.sequence_index]


def sequence_comm(
    member: Member, rank_groups: dict[str, list[list[int]]], timeout: timedelta | None = None
) -> ProcessGroupComm:
    """Create the process groups of all sequence groups and join this process's own.

    Every process must call this with the same lists. rank_groups: per axis ("sequence", "ulysses",
    "ring") all groups as global ranks in rank order; they need not be contiguous, but must ascend,
    because torch.distributed numbers the processes of a group that way (else ValueError).
    """
    unsorted = [
        ranks for lists in rank_groups.values() for ranks in lists if ranks != sorted(ranks)
    ]
    if unsorted:
        raise ValueError(
            f"sequence groups are out of order: got {unsorted}, expected ascending ranks"
            " (sequence_comm). Fix: sort them"
        )
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
    """Build the mesh of the initialised default process group.

    Every process passes the same degrees. timeout: limit for a collective of the sequence groups
    (None: torch's default; new groups do not inherit the default group's). Raises ValueError for
    degrees whose product is not the world size.
    """
    if degrees.world != dist.get_world_size():
        raise ValueError(
            f"mesh does not fit: got {degrees} = {degrees.world} processes,"
            f" expected {dist.get_world_size()} (key parallel)."
            f" Fix: launcher.workers={degrees.world}"
        )
    place = degrees.coordinate(dist.get_rank())
    inner = degrees.dp_shard * degrees.cp
    if degrees.dp_replicate > 1:
        fsdp = init_device_mesh(
            device_type,
            (degrees.dp_replicate, inner),
            mesh_dim_names=("dp_replicate", "dp_shard_cp"),
        )
    else:
        fsdp = init_device_mesh(device_type, (inner,), mesh_dim_names=("dp_shard_cp",))
    comm = None
    if degrees.cp > 1:
        member = Member(place.ring, place.ulysses, degrees.ring, degrees.ulysses)
        axes = [
            "sequence",
            *(["ulysses"] if degrees.ulysses > 1 else []),
            *(["ring"] if degrees.ring > 1 else []),
        ]
        comm = sequence_comm(member, {axis: degrees.groups(axis) for axis in axes}, timeout)
    return Mesh(degrees, place, fsdp, comm)
