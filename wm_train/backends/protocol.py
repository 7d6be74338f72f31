"""Define the whole interface between wm_train and hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.reference import Kernels


def seed_everything(seed: int) -> None:
    """Seed the generators of every device that torch knows; training uses keyed generators only."""
    torch.manual_seed(seed)


def use_deterministic_kernels() -> None:
    """Ask torch for kernels that repeat to the bit; one that has none says so in a warning."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def profile_host() -> AbstractContextManager[Any]:
    """Return a profiler of the host's activity."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def default_kernels(device: torch.device, engine: str, attention: str) -> Kernels:
    """Return the kernels of `wm_train.kernels` for this device.

    They fall back to plain PyTorch, with a log line, where it has none.
    """
    from wm_train.kernels.dispatch import sequence_kernels

    return sequence_kernels(device, engine, attention)


@dataclass(frozen=True)
class Backend:
    """Describe one worker's hardware.

    - device: the device of its tensors.
    - collectives: the torch.distributed back end that connects workers.
    - synchronize: waits for queued work (for correct timings).
    - memory: bytes, {"allocated", "peak"}.
    - peak_flops: the dense bf16 rate stated by the vendor, FLOP/s; None where unknown.
    - autocast_dtype: the half precision type to use.
    - stream, event: create one, to queue work beside the main queue and to wait for it; None where
      work is not queued.
    - kernels(device, engine, attention): the table of local kernels, keys backend.kernels and
      backend.attention.
    - seed: seeds every generator of the device.
    - profiler: a context with start(), stop() and export_chrome_trace(path); torch's own has
      `key_averages()` besides.
    - free_memory: bytes of the device that nobody uses; None where the host's memory is meant.
    - capabilities: optional features by name: "premul_sum" (collectives that scale their input; not
      needed here, as gradients are summed), "device_timers" (events that measure time), "pinned"
      (host memory for copies that overlap with computation).
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
    free_memory: Callable[[], int] | None = None
    capabilities: frozenset[str] = field(default_factory=frozenset)


def peak_of(name: str, rates: Mapping[str, float]) -> float | None:
    """Return the rate of the first key that a device's name contains, None where none is."""
    return next((rate for key, rate in rates.items() if key in name), None)


def take_device(kind: str, module: Any, local_rank: int, threads: int) -> torch.device:
    """Make device `local_rank` of this node the current one and return it.

    module: torch.<kind>. Raises ValueError if there are fewer devices.
    """
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
    """Return the bytes that tensors use now, and their peak."""
    return {
        "allocated": module.memory_allocated(device),
        "peak": module.max_memory_allocated(device),
    }
