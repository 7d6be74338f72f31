"""Locate this process's part of a global tensor; the only module that looks inside DTensor.

A box is (offset, shape), one integer per dimension, in elements. Checkpoints, name-keyed
initialisation and EMA use boxes only, so none of them depends on how a tensor is sharded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from wm_train.compat import local_shape_and_offset


class Box(NamedTuple):
    """Describe a hyper-rectangle of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def empty(self) -> bool:
        return 0 in self.shape


class RowShards(NamedTuple):
    """Describe how the rows (first dimension) of a tensor are split over processes.

    group: the processes that hold one part each; None: this one holds the whole. place: this
    process's number in the group; rows: how many each process has, in order.
    """

    group: ProcessGroup | None
    place: int
    rows: tuple[int, ...]


def row_shards(tensor: torch.Tensor) -> RowShards:
    """Return how a tensor's rows are split. Replicas of a part form groups of their own."""
    if not isinstance(tensor, DTensor):
        return RowShards(None, 0, (tensor.shape[0],))
    split = [i for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    assert [tensor.placements[i].is_shard(0) for i in split] == [True], tensor.placements
    mesh, total = tensor.device_mesh, tensor.shape[0]
    each, index = -(-total // mesh.size(split[0])), mesh.get_local_rank(split[0])
    rows = tuple(min(each, max(0, total - i * each)) for i in range(mesh.size(split[0])))
    assert rows[index] == tensor.to_local().shape[0], (rows, tensor.to_local().shape)
    return RowShards(mesh.get_group(split[0]), index, rows)


def zeros_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a zero for each row of a tensor, fp32 [R], split over processes as the rows are."""
    local = local_tensor(tensor)
    zeros = torch.zeros(local.shape[0], dtype=torch.float32, device=local.device)
    if not isinstance(tensor, DTensor):
        return zeros
    return DTensor.from_local(
        zeros,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size((tensor.shape[0],)),
        stride=(1,),
    )


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, gathered if it is a DTensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: torch.Tensor) -> Box:
    """Return the box of the local storage in the global tensor."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    shape, offset = local_shape_and_offset(tensor)
    return Box(offset, shape)


def is_first_copy(tensor: torch.Tensor, rank: int) -> bool:
    """Return True if this process writes its box: replicas and plain tensors are written once."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a sharded tensor outside its mesh"
    return all(
        c == 0
        for c, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def overlap(a: Box, b: Box) -> Box:
    """Return the intersection of two boxes, in global elements; empty when they do not meet."""
    start = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    stop = tuple(
        min(x + n, y + m) for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
    return Box(start, tuple(max(0, e - s) for s, e in zip(start, stop, strict=True)))


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Return the slices that select `inner` from the storage of `outer`."""
    return tuple(
        slice(i - o, i - o + n)
        for i, o, n in zip(inner.offset, outer.offset, inner.shape, strict=True)
    )
