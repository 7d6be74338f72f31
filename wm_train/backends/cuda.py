"""NVIDIA workers over NCCL."""

from __future__ import annotations

import torch

from wm_train.backends.protocol import Backend

# dense bf16, from the vendor's data sheets of the SXM parts; longer names first
PEAK_FLOPS = {"GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100": 989e12, "A100": 312e12}


def present() -> bool:
    """Whether this process can use an NVIDIA device."""
    return torch.cuda.is_available()


def make(threads: int, local_rank: int) -> Backend:
    """A worker that drives device `local_rank` of its node."""
    if not present():
        raise ValueError("backend: got 'cuda', expected an NVIDIA device that torch can use (key backend.name). Fix: backend.name=cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"backend: got worker {local_rank} of a node, expected less than its {count} devices (key launcher.workers). "
            f"Fix: launcher.workers={count}"
        )
    torch.set_num_threads(threads)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)), None)
    return Backend("cuda", device, "nccl", lambda: torch.cuda.synchronize(device), lambda: _memory(device), peak)


def _memory(device: torch.device) -> dict[str, int]:
    return {"allocated": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
