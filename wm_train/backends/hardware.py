"""Read profiles of devices: what a plan may assume of one that is not here.

`hardware.json` beside this file holds every number with its source and the month in which it was
read. Numbers that nobody published are marked as assumed there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True)
class Hardware:
    """Describe a device: FLOP/s, bytes, bytes per second, seconds.

    peak: dense, in bf16; matmul: best seen of a large product; attention, attention_backward: of a
    fused kernel; inside, across: bytes per second one way to its node and out of it, per device;
    base_s, inside_step_s, across_step_s: of a collective and of each step of its ring; launch_s:
    host time of an operator; stages: seconds of measured steps by the fingerprint of a shallow
    plan, of a profile that `wm_train.calibrate` wrote.
    """

    key: str
    name: str
    device: str
    peak: float
    matmul: float
    attention: float
    attention_backward: float
    memory: float
    memory_rate: float
    node_devices: int
    inside: float
    across: float
    base_s: float
    inside_step_s: float
    across_step_s: float
    launch_s: float
    stages: Mapping[str, float] = field(default_factory=dict)


@cache
def profiles() -> dict[str, dict[str, Any]]:
    """Return the profiles as they stand in the file, by key."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return found


def hardware(key: str) -> Hardware:
    """Return the profile `key`. Raises KeyError for one that is not in the file."""
    return profile_from(key, profiles()[key])


def own_profile(path: Path) -> Hardware:
    """Return the profile that `wm_train.calibrate` wrote. Raises OSError, or ValueError for a file
    that is none."""
    try:
        ((key, profile),) = json.loads(path.read_text()).items()
        return profile_from(key, profile)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no profile: {error!r}") from error


def profile_from(key: str, profile: Mapping[str, Any]) -> Hardware:
    """Return a profile as it stands in a file."""
    n = {name: entry["value"] for name, entry in profile["numbers"].items()}
    return Hardware(
        key=key,
        name=profile["name"],
        device=profile["device"],
        peak=n["peak_tflops"] * 1e12,
        matmul=n["matmul_tflops"] * 1e12,
        attention=n["attention_tflops"] * 1e12,
        attention_backward=n["attention_backward_tflops"] * 1e12,
        memory=n["memory_gb"] * 1e9,
        memory_rate=n["memory_gb_s"] * 1e9,
        node_devices=int(n["node_devices"]),
        inside=n["inside_gb_s"] * 1e9,
        across=n["across_gb_s"] * 1e9,
        base_s=n["base_us"] * 1e-6,
        inside_step_s=n["inside_step_us"] * 1e-6,
        across_step_s=n["across_step_us"] * 1e-6,
        launch_s=n["launch_us"] * 1e-6,
        stages={name: one["value"] for name, one in profile.get("stages", {}).items()},
    )
