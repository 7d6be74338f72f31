"""Run workers on CPUs with gloo, for the demo, the tests and every oracle."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from wm_train.backends.protocol import Backend


def make(threads: int, local_rank: int) -> Backend:
    """Return a CPU worker with a fixed thread count.

    Sums then always run in the same order, so losses repeat to the bit.
    """
    torch.set_num_threads(threads)
    return Backend("cpu", torch.device("cpu"), "gloo", synchronize=lambda: None, memory=_memory)


def _memory() -> dict[str, int]:
    """Return resident and peak resident bytes of this process."""
    pages = (
        int(Path("/proc/self/statm").read_text().split()[1])
        if Path("/proc/self/statm").exists()
        else 0
    )
    held = pages * resource.getpagesize()
    # the kernel's peak lags
    return {
        "allocated": held,
        "peak": max(held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }
