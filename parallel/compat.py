"""Wrap private and recent APIs of torch and DeepSpeed, each with the versions it was read in.

The oldest supported torch is 2.10.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# FSDP2's set_custom_all_gather and set_custom_reduce_scatter take subclasses. torch 2.10 to 2.13.
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather as AllGather
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter


def all_gather_single(
    output: Tensor, shard: Tensor, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """Gather the [n] of every process into `output` [P·n].

    torch 2.13 has this name and warns about the old one, the only one in 2.10 and 2.11.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, shard, group=group, async_op=async_op)


def reduce_scatter_single(
    output: Tensor, summands: Tensor, op: Any, group: dist.ProcessGroup, async_op: bool
) -> dist.Work | None:
    """Reduce [P·n] over the processes; each keeps its `output` [n].

    torch 2.13 has this name and warns about the old one, the only one in 2.10 and 2.11.
    """
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, summands, op=op, group=group, async_op=async_op)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Return what packs tensors that autograd saves, and unpacks them; None without. torch 2.10 to
    2.13."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def in_backward() -> bool:
    """Return True inside a backward pass of this thread. torch 2.10 to 2.13."""
    return bool(torch._C._current_graph_task_id() != -1)


# Of DeepSpeed's ZeRO-3 optimizer, read in 0.19.8. A group is the index of one of its flat tensors.


def lies_on_disk(optimizer: Any, group: int) -> bool:
    """Return True if a group's master weights and moments are kept on NVMe. DeepSpeed 0.19.8."""
    return bool(optimizer._swappable_optimizer_subgroup(group))


def swapped_gradients(optimizer: Any, group: int) -> dict[int, Tensor]:
    """Return {offset: flat shard}, the gradients in memory of a group on NVMe. DeepSpeed 0.19.8."""
    flat = optimizer.fp32_partitioned_groups_flat[group]
    held = optimizer.optimizer_swapper.swap_params_info[flat.ds_id].unswapped_gradients
    return cast(dict[int, Tensor], held)


def swap_in(optimizer: Any, group: int) -> None:
    """Read a group's weights, moments and gradients from NVMe into memory. DeepSpeed 0.19.8."""
    optimizer._optimizer_states_and_gradient_swap_in(group)


def swap_out(optimizer: Any, group: int, changed: bool) -> None:
    """Free the memory of a group that `swap_in` has read, after writing it to NVMe if `changed`.

    DeepSpeed 0.19.8.
    """
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(group)
    else:
        optimizer._release_swap_buffers(group)


def swap_buffers(optimizer: Any) -> list[Tensor]:
    """Return the host buffers through which groups move to and from NVMe. DeepSpeed 0.19.8."""
    return list(optimizer.optimizer_swapper.swap_buffer_manager.all_buffers)


def place_in_group(optimizer: Any, parameter: Tensor) -> tuple[int, slice]:
    """Return a parameter's group and its slice of the flat tensor. DeepSpeed 0.19.8."""
    group, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return group, slice(start, start + count)


def own_gradient(optimizer: Any, parameter: Tensor) -> Tensor:
    """Return this process's flat shard [n] of a gradient, fp32. DeepSpeed 0.19.8."""
    return cast(Tensor, optimizer._get_fp32_grad_state_partition(parameter, False)[0])


def drop_gathered_weights(optimizer: Any) -> None:
    """Free whole parameters that a forward pass has gathered. DeepSpeed 0.19.8."""
    optimizer._partition_all_parameters()


def copy_masters_to_weights(optimizer: Any, group: int) -> None:
    """Copy a group's master weights into the weights used for computing. DeepSpeed 0.19.8."""
    optimizer._reassign_or_swap_out_partitioned_parameters(group)


def keep_gradients_in_memory(optimizer: Any) -> None:
    """Keep gradients of groups on NVMe in host memory, through which they pass anyway.

    DeepSpeed 0.19.8 would write those of large parameters to files and read each back at the offset
    of its parameter, which direct IO refuses for most offsets. It does not check the result, so the
    gradient would be whatever the memory held before. The gaps (a flat shard that ends early, a
    parameter without a gradient) are set to zero, because they count in the norm.
    """
    swapper = optimizer.optimizer_swapper
    read = swapper._swap_in_gradients

    def swap_out_gradients(
        parameter: Tensor, gradient_offsets: list[int], gradient_tensors: list[Tensor]
    ) -> None:
        held = swapper.swap_params_info[swapper.parameter_id(parameter)].unswapped_gradients
        on_host = [tensor.cpu() for tensor in gradient_tensors]
        held |= dict(zip(gradient_offsets, on_host, strict=True))

    def into_zeros(aio_handle: Any, parameter: Tensor, dest_buffer: Tensor) -> None:
        read(aio_handle, parameter, dest_buffer.zero_())

    swapper.swap_out_gradients, swapper._swap_in_gradients = swap_out_gradients, into_zeros
