"""Which box of a global tensor this process holds: the one place that looks inside DTensor.

A box is (offset, shape), one integer per dimension, in elements. Checkpoints, name-keyed
initialisation and EMA speak of boxes only, so none of them depends on how a tensor is sharded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from wm_train.compat import local_shape_and_offset


class Box(NamedTuple):
    """A hyper-rectangle of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def empty(self) -> bool:
        return 0 in self.shape


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of this process: the local shard of a DTensor, the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered if it is a DTensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: torch.Tensor) -> Box:
    """Where the local storage lies in the global tensor."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    shape, offset = local_shape_and_offset(tensor)
    return Box(offset, shape)


def is_first_copy(tensor: torch.Tensor, rank: int) -> bool:
    """Whether this process is the one that writes its box: replicas and plain tensors are written
    once."""
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
    """The box in both, in global elements; empty when they do not meet."""
    start = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    stop = tuple(
        min(x + n, y + m) for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
    return Box(start, tuple(max(0, e - s) for s, e in zip(start, stop, strict=True)))


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that pick `inner` out of the storage of `outer`."""
    return tuple(
        slice(i - o, i - o + n)
        for i, o, n in zip(inner.offset, outer.offset, inner.shape, strict=True)
    )
