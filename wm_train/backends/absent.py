"""Name the kinds of devices that a plan can stand for on a machine without them."""

from __future__ import annotations

import os
from pathlib import Path

Device = tuple[str, tuple[int, int]]

# kind -> type and compute capability that choose its kernels; None: the plain ones
KINDS: dict[str, Device | None] = {"cpu": None, "cuda": ("cuda", (9, 0)), "npu": None}


def likely_kind(backend: str, half: bool) -> str:
    """Return the kind of device that a stage will find: the configured one, that of this machine,
    or where it has none, an accelerator for a stage that computes in half precision."""
    if backend != "auto":
        return backend if backend in KINDS else "cpu"
    import torch  # takes seconds, for which a kept plan does not wait

    return "cuda" if half or torch.cuda.is_available() else "cpu"


def facts_of_machine() -> list[object]:
    """Return facts on which `likely_kind` depends besides its arguments, found without torch."""
    return [Path("/dev/nvidiactl").exists(), os.environ.get("CUDA_VISIBLE_DEVICES")]
