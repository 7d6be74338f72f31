"""Measure times and a device's ceilings, and judge a figure by the range that a roofline expects.

A call cannot be faster than its bytes at the measured copy bandwidth or its FLOPs at the measured
product rate, whichever takes longer: its floor. The expected range begins at half the floor, since
a part of what is written may be read again from a cache, and ends at the floor over the
`efficiency` that is asked for, plus the launches at the measured time of one. Below the range
something was not computed or not timed; above it is slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

BELOW_FLOOR = 0.5
BAD = ("wrong", "slow", "fast", "failed", "cut")


@dataclass(frozen=True)
class Row:
    """Store one figure, the range expected of it, and the verdict: ok | wrong | slow | fast |
    failed | cut | absent (its note says what is missing) | figure (nothing is expected of it)."""

    step: str
    what: str
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    verdict: str = "figure"
    note: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict in BAD

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ceilings:
    """Store what a device can do at most, as measured: bytes read and written per second by a
    copy, FLOP/s of a bf16 product, seconds from one launch to the next."""

    copy: float
    product: float
    launch: float


@dataclass(frozen=True)
class Work:
    """Count what a call must do at least: bytes moved, FLOPs, and how often it launches."""

    bytes: float = 0.0
    flops: float = 0.0
    launches: int = 1

    def floor(self, ceilings: Ceilings) -> float:
        """Return the seconds below which no implementation gets."""
        return max(self.bytes / ceilings.copy, self.flops / ceilings.product)

    def expected(
        self, ceilings: Ceilings, efficiency: float = 0.5, slack: float = 1.0
    ) -> tuple[float, float]:
        """Return the range of milliseconds; see above. `slack` widens the upper end."""
        floor = self.floor(ceilings)
        high = (floor / efficiency + self.launches * ceilings.launch) * slack
        return 1e3 * BELOW_FLOOR * floor, 1e3 * high


def judged(
    step: str,
    what: str,
    value: float,
    unit: str,
    low: float | None,
    high: float | None,
    above: str = "slow",
    below: str = "fast",
    note: str = "",
) -> Row:
    """Return a figure with its verdict; `above` and `below` name what is outside. A NaN is
    above."""
    verdict = "ok"
    if low is not None and value < low:
        verdict = below
    elif high is not None and not value <= high:
        verdict = above
    return Row(step, what, value, unit, low, high, verdict, note)


def error_row(step: str, what: str, error: float, bound: float, note: str = "") -> Row:
    """Return an RMS ratio to fp64 with its verdict."""
    return judged(step, what, error, "RMS ratio", None, bound, above="wrong", note=note)


def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the RMS of the difference over the RMS of `expected`, in fp64."""
    wide = expected.double()
    return ((actual.double() - wide).norm() / wide.norm().clamp_min(1e-30)).item()


def synchronize(device: torch.device) -> None:
    """Wait for queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU (shows only that the script runs)"


def milliseconds(
    call: Callable[[], Any],
    repeats: int,
    device: torch.device,
    warm_up: int = 3,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the median time of a call over `repeats`, each the mean of `calls` in a row."""
    times = []
    for i in range(repeats + warm_up):
        synchronize(device)
        start = clock()
        for _ in range(calls):
            call()
        synchronize(device)
        if i >= warm_up:
            times.append((clock() - start) / calls)
    return 1e3 * statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int, size: int | None = None) -> float:
    """Return the GB/s read and written by a large copy of `size` bytes."""
    size = size or 1 << (30 if device.type == "cuda" else 24)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), repeats, device) / 1e6


def product_rate(device: torch.device, repeats: int, size: int = 0) -> float:
    """Return the FLOP/s of a large bf16 product of random matrices."""
    size = size or (8192 if device.type == "cuda" else 128)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, repeats, device) * 1e3


def launch_seconds(device: torch.device, repeats: int, ours: bool) -> float:
    """Return the seconds from one launch of a small kernel to the next: of ours, or of PyTorch's
    where Triton does not run."""
    x = torch.ones(1, 1, 4, 64, device=device)
    calls = 50 if device.type == "cuda" else 2
    if not ours:
        return milliseconds(lambda: x.add(1), repeats, device, 2, calls) / 1e3
    from wm_train.kernels.gdn.launching import norm_pre_pass

    return milliseconds(lambda: norm_pre_pass(x, 64, 1e-5), repeats, device, 2, calls) / 1e3


def ceilings(device: torch.device, repeats: int, ours: bool) -> Ceilings:
    """Measure the ceilings of a device; `ours`: Triton runs there."""
    return Ceilings(
        1e9 * copy_bandwidth(device, repeats),
        product_rate(device, repeats),
        launch_seconds(device, repeats, ours),
    )
