"""Placing workers: a `LaunchSpec` goes in, an exit code comes out. Knows nothing of training; imports nothing of ours."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.progress import ProgressView
    from launch.spec import LaunchSpec

LAUNCHERS = {
    "inline": "launch.inline",
    "ray": "launch.on_ray",
    "slurm": "launch.on_slurm",
    "torchrun": "launch.on_torchrun",
}  # imported when used, as Ray takes a second


def run(launcher: str, spec: LaunchSpec, view: ProgressView) -> int:
    """Run `spec` with the named launcher (a key of LAUNCHERS) to its end; returns the exit code, 128 + n for signal n."""
    return int(import_module(LAUNCHERS[launcher]).run(spec, view))
