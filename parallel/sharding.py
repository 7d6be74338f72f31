"""Shard a model with FSDP2: over dp_shard × context parallel, replicated over dp_replicate.

One convention for gradients: they are **summed** over every process and never averaged. The
objective divides by the size of the global batch, and a context-parallel rank contributes only what
flows through its own frames, so the plain sum is the gradient of the mean loss on any mesh.
(Averaging inside the communication library is silently wrong on some, absent on others.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block with torch.compile.

    Compiled are the methods named in its `PARTS`, which checkpointing recomputes one by one and
    from outside of any graph, or else its forward pass. Collectives stay outside the graphs: give
    the model sequences of `make_sequence(compiled=True)`. FSDP gathers and frees a block around its
    forward, so calling this before or after `shard_model` is the same.
    """
    for block in blocks:
        for part in getattr(block, "PARTS", ("forward",)):
            setattr(block, part, torch.compile(getattr(block, part), dynamic=False))


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    precision: str = "fp32",
    offload: bool = False,
    exact: Iterable[nn.Module] = (),
) -> nn.Module:
    """Shard `model` in place, each of `blocks` as one unit that is gathered just before it runs.

    `mesh` is one-dimensional (FSDP) or [replicate, shard] (HSDP). Master weights and reduction stay
    fp32; `precision` is the dtype that blocks compute in. Inputs are not cast: sigmas and cameras
    must stay fp32, and the model casts its own activations. With `offload`, a process keeps its
    shards of weights and gradients in host memory, so the optimizer steps there; blocks move to the
    device when they run. A single process that computes in fp32 has nothing to shard, cast or move:
    its model stays as it is. `exact`: modules, inside blocks or not, that compute in fp32: a unit
    each, as the weights of one unit have one type. An fp64 model, as proofs take, stays fp64 where
    others are fp32.
    """
    if mesh.size() == 1 and precision == "fp32" and not offload:
        return model
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    double = any(parameter.dtype is torch.float64 for parameter in model.parameters())
    widest = torch.float64 if double else torch.float32
    wide = MixedPrecisionPolicy(param_dtype=widest, reduce_dtype=widest, cast_forward_inputs=False)
    policy = wide if precision == "fp32" else replace(wide, param_dtype=PRECISIONS[precision])
    for module in exact if precision != "fp32" else ():
        fully_shard(module, mesh=mesh, mp_policy=wide, offload_policy=place)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=place)
    # The root too: left gathered after a forward pass without a backward, it would show optimizer
    # and checkpoint other parameters.
    fully_shard(
        model, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the weights of a sharded model gathered between the passes inside this context, which
    must take no gradients. Every rank must enter it; without shards it does nothing."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:  # all units of `shard_model` free their weights after a pass
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
