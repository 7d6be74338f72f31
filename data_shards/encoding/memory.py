"""Compare what a clip's pictures take with the memory that is free, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_shards.schema import DataError
from data_shards.sources.clips import SourceClip

# of Linux: the machine's, and what a container's group may have and has
MACHINE = Path("/proc/meminfo")
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes() -> int | None:
    """Return the memory that this process may take; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in MACHINE.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, used in GROUPS:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such group, or `max`
            continue
        free = min(free, left)
    return free


def check_memory(clips: Sequence[SourceClip], copies: int, workers: int) -> None:
    """Raise DataError if the pictures of the largest clip cannot be held.

    copies: how often the pictures are in memory at a time. This is the least that is needed: a
    codec may need more.
    """
    free = free_bytes()
    largest = max(clips, key=lambda clip: clip.frames * clip.height * clip.width)
    each = largest.frames * largest.height * largest.width * 3
    need = each * copies * workers
    if free is not None and need > free:
        many = f" for {workers} workers" if workers > 1 else ""
        ways = ["clip_frames=<frames>, which cuts videos into clips"]
        ways += ["psnr=no"] * (copies > 1) + ["fewer workers"] * (workers > 1)
        raise DataError(
            f"memory: got {largest.frames} frames of {largest.height}x{largest.width} in clip"
            f" {largest.key}, {need / 1e9:.3g} GB{many}, expected at most the"
            f" {free / 1e9:.3g} GB that are free. Fix: {', or '.join(ways)}"
        )
