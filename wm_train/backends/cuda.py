"""Run workers on NVIDIA devices with NCCL."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity

from wm_train.backends.protocol import Backend, accelerator_memory, peak_of, take_device

# dense bf16, from the vendor's data sheets of the SXM parts; longer names first
PEAK_FLOPS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12}


def present() -> bool:
    """Return True if this process can use an NVIDIA device."""
    return torch.cuda.is_available()


def make(threads: int, local_rank: int) -> Backend:
    """Return a worker that uses device `local_rank` of its node."""
    if not present():
        raise ValueError(
            "backend: got 'cuda', expected an NVIDIA device that torch can use (key backend.name)."
            " Fix: backend.name=cpu"
        )
    device = take_device("cuda", torch.cuda, local_rank, threads)
    return Backend(
        name="cuda",
        device=device,
        collectives="nccl",
        synchronize=lambda: torch.cuda.synchronize(device),
        memory=lambda: accelerator_memory(torch.cuda, device),
        peak_flops=peak_of(torch.cuda.get_device_name(device), PEAK_FLOPS),
        free_memory=lambda: int(torch.cuda.mem_get_info(device)[0]),
        stream=lambda: torch.cuda.Stream(device),
        event=lambda: torch.cuda.Event(enable_timing=True),
        profiler=lambda: torch.profiler.profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]
        ),
        capabilities=frozenset({"premul_sum", "device_timers", "pinned"}),
    )
