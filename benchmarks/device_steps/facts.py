"""Record step (a): the facts of the machine, and what its device can do at most."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from device_steps.day import Day, attempt
from measuring import Row, device_name, milliseconds

PACKAGES = (
    "torch", "triton", "numpy", "flash_attn", "flash_attn_3", "xfuser", "yunchang",
    "flash-linear-attention", "deepspeed", "hydra-core", "ray", "mlflow-skinny",
)  # fmt: skip
MODULES = ("flash_attn_interface", "flash_attn", "xfuser", "fla")
TOOLS = ("nvidia-smi", "nvcc", "ptxas", "compute-sanitizer", "ncu", "nsys", "g++")
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm"


def rows(day: Day) -> Iterator[Row]:
    """Yield one row per fact."""

    def fact(what: str, text: object) -> Row:
        return Row("a", what, note=str(text))

    yield fact("device", device_name(day.device))
    yield fact("python", f"{platform.python_version()} at {sys.executable}")
    yield fact("system", f"{platform.platform()}, {os.cpu_count()} CPUs")
    for package in PACKAGES:
        try:
            yield fact(f"package {package}", version(package))
        except PackageNotFoundError:
            yield Row("a", f"package {package}", verdict="absent", note="not installed")
    for module in MODULES:
        if find_spec(module) is None:
            yield Row("a", f"module {module}", verdict="absent", note="cannot be imported")
    for tool in TOOLS:
        yield fact(f"tool {tool}", shutil.which(tool) or "not on PATH")
    yield fact("torch's CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if day.dry and day.no_interpreter is not None:
        why = f"the reference runs in its place: {day.no_interpreter}"
        yield Row("a", "Triton's interpreter", verdict="absent", note=why)
    yield from attempt("a", "device properties", lambda: properties(day))
    yield from attempt("a", "ceilings", lambda: rates(day))


def properties(day: Day) -> Iterator[Row]:
    """Yield what the driver says of the device."""
    if day.device.type != "cuda":
        yield Row("a", "device properties", verdict="absent", note="no CUDA device: a dry run")
        return
    p = torch.cuda.get_device_properties(day.device)
    yield Row("a", "memory", p.total_memory / 2**30, "GiB")
    yield Row("a", "multiprocessors", float(p.multi_processor_count))
    yield Row("a", "L2", p.L2_cache_size / 2**20, "MiB")
    yield Row(
        "a", "shared memory a program may have", p.shared_memory_per_block_optin / 2**10, "KiB"
    )
    yield Row("a", "capability", note=f"{p.major}.{p.minor}")
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    yield Row("a", "nvidia-smi", note=" / ".join(found.stdout.strip().splitlines()))


def rates(day: Day) -> Iterator[Row]:
    """Yield the measured ceilings, on which every expected range rests."""
    yield Row("a", "copy bandwidth, read and written", day.ceilings.copy / 1e9, "GB/s")
    yield Row("a", "large bf16 product", day.ceilings.product / 1e12, "TFLOP/s")
    yield Row("a", "one launch to the next", day.ceilings.launch * 1e6, "µs")
    size = 1 << (20 if day.dry else 30)
    pin = day.device.type == "cuda"
    host = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    there = torch.empty_like(host, device=day.device)
    ms = milliseconds(lambda: there.copy_(host, non_blocking=True), day.repeats, day.device)
    yield Row("a", "pinned host memory to the device", size / ms / 1e6, "GB/s")
