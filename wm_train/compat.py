"""Wrap the private APIs of torch that `wm_train` uses, each with the versions it was read in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Computes shapes without storage, and raises the first where a value is read; torch exports them
# from no public module. torch 2.10 to 2.13.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException as DataDependentOutputException,
)
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import (
    in_kernel_invocation_manager as in_kernel_invocation_manager,  # to set a tensor's storage
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# A store for process groups of the back end "fake", which answer collectives without other
# processes; importing it registers that back end. torch 2.10 to 2.13.
from torch.testing._internal.distributed.fake_pg import FakeStore as FakeStore

# Calls operators past all modes. torch 2.10 to 2.13.
from torch.utils._mode_utils import no_dispatch as no_dispatch

# Calls of operators, seen from within a `with` block. torch 2.10 to 2.13.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# The leaves of nested results, and nested results with other leaves. torch 2.10 to 2.13.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map


def local_shape_and_offset(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape of this process's shard and where it begins in the whole tensor, in elements per
    dimension. torch 2.10 to 2.13."""
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return tuple(shape), tuple(offset)


class _Pieces:
    """Hold the pieces of a tensor that FSDP2 deals over a shard group, each cut when it is read."""

    def __init__(self, tensor: torch.Tensor, count: int, dim: int) -> None:
        self.tensor, self.dim, self.size = tensor, dim, -(-tensor.shape[dim] // count)

    def __getitem__(self, place: int) -> torch.Tensor:
        whole = self.tensor.shape[self.dim]
        start = min(place * self.size, whole)
        length = min(self.size, whole - start)
        if not length:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, length)


def fake_tensor(plain: Tensor, device: torch.device, attributes: Mapping[str, Any]) -> FakeTensor:
    """Return a tensor without values, of a meta tensor's shape and storage, with the attributes of
    another one. FakeTensor's own constructor takes four times as long. torch 2.10 to 2.13."""
    sort = {"dispatch_device": True, "device_for_backend_keys": device}
    made: FakeTensor = Tensor._make_subclass(FakeTensor, plain, False, **sort)  # type: ignore
    torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(attributes)
    return made


@contextmanager
def without_labels() -> Iterator[None]:
    """Let FSDP2 set no profiler's labels, two operators for each of its hooks, which in a rehearsal
    take longer than what they label. torch 2.10 to 2.13."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    places: list[Any] = [_fsdp_param_group, torch.profiler]
    before = [place.record_function for place in places]
    for place in places:
        place.record_function = nullcontext
    try:
        yield
    finally:
        for place, original in zip(places, before, strict=True):
            place.record_function = original


@contextmanager
def units_left_out() -> Iterator[None]:
    """Let a backward pass that only accumulates leave out units that were never gathered, as one
    that reduces does: an expert at whose noise levels no clip has been. FSDP2 fails there with an
    AttributeError in mixed precision. torch 2.10 to 2.13."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    original = FSDPParam.to_accumulated_grad_if_needed

    def accumulate(param: FSDPParam) -> None:
        if hasattr(param, "_unsharded_param"):
            original(param)

    FSDPParam.to_accumulated_grad_if_needed = accumulate  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        FSDPParam.to_accumulated_grad_if_needed = original  # type: ignore[method-assign]


@contextmanager
def pieces_as_read() -> Iterator[None]:
    """Let FSDP2 cut from a weight only the pieces that it reads, its own and the first: it cuts one
    for each rank, which in a rehearsal of many ranks takes longer than the step. torch 2.10 to
    2.13."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    before = _fsdp_param._chunk_with_empty
    _fsdp_param._chunk_with_empty = _Pieces  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = before
