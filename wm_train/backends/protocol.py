"""What a device vendor must answer; the whole interface between wm_train and hardware."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.reference import Kernels


def seed_everything(seed: int) -> None:
    """Seed the generators of every device that torch knows. Training draws from keyed generators
    only (design §5)."""
    torch.manual_seed(seed)


def profile_host() -> AbstractContextManager[Any]:
    """A profiler of what the host does."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def default_kernels(device: torch.device, engine: str, attention: str) -> Kernels:
    """The kernels of `wm_train.kernels` for this device; they fall back to plain PyTorch with a log
    line where it has none."""
    from wm_train.kernels.dispatch import sequence_kernels

    return sequence_kernels(device, engine, attention)


@dataclass(frozen=True)
class Backend:
    """One worker's hardware.

    device: where its tensors live. collectives: the torch.distributed back end that joins workers.
    synchronize: waits for queued work (for honest timings). memory: bytes, {"allocated", "peak"}.
    peak_flops: the dense bf16 rate that the vendor states, FLOP/s; None where it is not known.
    autocast_dtype: what half precision is here. stream, event: make one, to queue work beside the
    main queue and to wait for it; None where work is not queued. kernels(device, engine,
    attention): the table of local kernels, keys backend.kernels and backend.attention. seed: every
    generator of the device. profiler: a context that has `key_averages()` once it is closed.
    capabilities: what not every vendor has, by name: "premul_sum" (collectives that scale on the
    way; nothing here needs it, as gradients are summed), "device_timers" (events that measure),
    "pinned" (host memory that copies run beside).
    """

    name: str
    device: torch.device
    collectives: str
    synchronize: Callable[[], None]
    memory: Callable[[], dict[str, int]]
    peak_flops: float | None = None
    autocast_dtype: torch.dtype = torch.bfloat16
    stream: Callable[[], Any] | None = None
    event: Callable[[], Any] | None = None
    kernels: Callable[[torch.device, str, str], Kernels] = default_kernels
    seed: Callable[[int], None] = seed_everything
    profiler: Callable[[], AbstractContextManager[Any]] = profile_host
    capabilities: frozenset[str] = field(default_factory=frozenset)


def take_device(kind: str, module: Any, local_rank: int, threads: int) -> torch.device:
    """Device `local_rank` of this node, made the current one; ValueError if there are fewer.
    module: torch.<kind>."""
    count = module.device_count()
    if local_rank >= count:
        raise ValueError(
            f"backend: got worker {local_rank} of a node, expected less than its {count} devices"
            f" (key launcher.workers). Fix: launcher.workers={count}"
        )
    torch.set_num_threads(threads)
    device = torch.device(kind, local_rank)
    module.set_device(device)
    return device


def accelerator_memory(module: Any, device: torch.device) -> dict[str, int]:
    """Bytes that tensors hold now and held at most."""
    return {
        "allocated": module.memory_allocated(device),
        "peak": module.max_memory_allocated(device),
    }
