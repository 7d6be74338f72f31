"""Run workers on Ascend devices with HCCL, through torch_npu.

Written against its documentation; it has not run on a device (see `backends check`).
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

from wm_train.backends.protocol import Backend, accelerator_memory, peak_of, take_device

# dense bf16 of one device as torch counts them, a die: of a 910C half of its package's 752e12
# (CloudMatrix384, arXiv 2506.12708). Public pages on the kinds of 910B disagree: measure.
PEAK_FLOPS = {"910B": 313e12, "910_93": 376e12, "910C": 376e12}


def present() -> bool:
    """Return True if torch_npu is installed and finds a device.

    It is imported only if it is installed: without its driver the import itself fails.
    """
    if "torch_npu" not in sys.modules and importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        return bool(_module().is_available())
    except (ImportError, OSError):
        return False


def make(threads: int, local_rank: int) -> Backend:
    """Return a worker that uses device `local_rank` of its node."""
    if not present():
        raise ValueError(
            "backend: got 'npu', expected torch_npu and a device that it sees (key backend.name)."
            " Fix: backend.name=cpu"
        )
    module = _module()
    device = take_device("npu", module, local_rank, threads)
    return Backend(
        name="npu",
        device=device,
        collectives="hccl",
        synchronize=module.synchronize,
        memory=lambda: accelerator_memory(module, device),
        peak_flops=peak_of(str(module.get_device_name(device)), PEAK_FLOPS),
        free_memory=lambda: int(module.mem_get_info(device)[0]),
        stream=lambda: module.Stream(device),
        event=lambda: module.Event(enable_timing=True),
        profiler=_profiler,
        capabilities=frozenset({"device_timers", "pinned"}),  # HCCL has no PREMUL_SUM
    )


def _module() -> Any:
    """Return torch.npu, which importing torch_npu adds to torch."""
    import torch_npu  # noqa: F401

    return torch.get_device_module("npu")


def _profiler() -> AbstractContextManager[Any]:
    import torch_npu

    return torch_npu.profiler.profile()
