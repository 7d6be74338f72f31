"""Choose the engine: Triton kernels where a device has them, plain PyTorch elsewhere.

Every unplanned choice is logged. Engines are named per call, not per process, so that a test can
run both side by side, and so that recomputation in a backward thread cannot pick another one than
the forward pass did.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from wm_train.kernels.names import ENGINES

KINDS = (
    "tokens",
    "states",
)  # of kernels: over tokens, which come in the compute dtype; over states, which are always fp32
FP32_TOKEN_DIM = 64  # largest D for which fp32 operands fit the shared memory
HEAD_DIMS = (16, 128)  # Triton tiles pad D to a power of two and must fit a multiprocessor
log = logging.getLogger("wm_train.kernels")

Capability = tuple[int, int] | None
_stands_for: ContextVar[tuple[str, Capability] | None] = ContextVar("stands_for", default=None)


@contextmanager
def rehearsed(
    device_type: str, capability: Capability, launched: Callable[[str, Any, Any], object]
) -> Iterator[None]:
    """Choose engines as on a device that is not here, and launch no kernel: for tensors without
    storage, which stand for tensors there. launched: called with each kernel's name, arguments,
    and constants by name."""
    before = _stands_for.set((device_type, capability))
    try:
        if importlib.util.find_spec("triton") is None:
            yield
            return
        from triton.runtime.jit import JITFunction

        original = JITFunction.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
            launched(kernel.fn.__name__, args, kwargs)

        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = original
    finally:
        _stands_for.reset(before)


def rehearsed_device() -> tuple[str, Capability] | None:
    """Return the device that tensors stand for inside `rehearsed`, None outside."""
    return _stands_for.get()


def interpreted() -> bool:
    """Return True if Triton interprets its kernels (TRITON_INTERPRET=1 before its first import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def resolve(
    engine: str,
    kind: str,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
) -> str:
    """Return `triton` or `reference`; the reason is logged once per distinct answer.

    Raises ValueError for an unknown engine, or for engine=triton where Triton cannot run.
    """
    if engine not in ENGINES:
        raise ValueError(
            f"kernels: got engine {engine!r}, expected one of {', '.join(ENGINES)}"
            " (wm_train.kernels). Fix: engine='auto'"
        )
    obstacle = _obstacle(kind, device_type, capability, dtype, head_dim)
    where = f"{kind}, {device_type}, capability {capability}, {dtype}, head dim {head_dim}"
    if engine == "reference":
        log.info("kernels: reference, as asked (%s)", where)
        return "reference"
    if obstacle is None:
        # the interpreter is a test bench, hundreds of times slower than PyTorch
        if engine == "auto" and device_type == "cpu":
            log.info("kernels: reference (%s): the CPU's own engine", where)
            return "reference"
        log.info("kernels: triton (%s)", where)
        return "triton"
    if engine == "triton":
        raise ValueError(
            f"kernels: got engine 'triton' on {where}, expected a device that has it: {obstacle}"
            " (wm_train.kernels). Fix: engine='auto'"
        )
    log.log(
        logging.INFO if device_type == "cpu" else logging.WARNING,
        "kernels: reference instead of triton (%s): %s",
        where,
        obstacle,
    )
    return "reference"


def _obstacle(
    kind: str,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
) -> str | None:
    """Return the reason why Triton cannot take these inputs; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed in {sys.prefix}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels compute float32 and bfloat16, not {dtype}"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1] or head_dim % 8:
        return f"the kernels take head dims {HEAD_DIMS[0]} … {HEAD_DIMS[1]} that divide by 8"
    if (
        device_type == "cuda"
        and kind == "tokens"
        and dtype == torch.float32
        and head_dim > FP32_TOKEN_DIM
    ):
        return (
            f"fp32 tokens with head dims above {FP32_TOKEN_DIM} need more shared memory than a"
            " multiprocessor has; bf16 tokens fit"
        )
    if device_type == "cuda":
        return (
            None
            if capability is not None and capability >= (8, 0)
            else "tensor cores with bf16 and TF32 begin at capability 8.0"
        )
    if device_type == "npu":
        if importlib.util.find_spec("triton.backends.ascend") is None:
            return (
                "the triton that is installed is not triton-ascend, which compiles for this device"
            )
        return (
            None  # no such device has run these kernels yet: `auto` tries them first, as everywhere
        )
    if device_type == "cpu":
        return None if interpreted() else "triton compiles for accelerators only"
    return f"no kernels for device type {device_type}"
