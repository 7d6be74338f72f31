"""What a device vendor must answer; the whole interface between wm_train and hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """One worker's hardware.

    `device` is where its tensors live, `collectives` the torch.distributed back end that joins workers, `synchronize` waits for queued work
    (for honest timings), `memory` reports bytes: {"allocated", "peak"}. `peak_flops` is the dense bf16 rate that the vendor states, in
    FLOP/s; None where it is not known.
    """

    name: str
    device: torch.device
    collectives: str
    synchronize: Callable[[], None]
    memory: Callable[[], dict[str, int]]
    peak_flops: float | None = None
