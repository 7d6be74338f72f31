"""Placing workers: a `LaunchSpec` goes in, an exit code comes out. Knows nothing of training;
imports nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.progress import ProgressView
    from launch.spec import LaunchSpec

LAUNCHERS = {
    "inline": "launch.inline",
    "kubernetes": "launch.on_kubernetes",
    "ray": "launch.on_ray",
    "slurm": "launch.on_slurm",
    "torchrun": "launch.on_torchrun",
}  # imported when used, as Ray takes a second
LATER = ("kubernetes", "slurm")  # these only prepare or queue the work


def takes_all_stages(launcher: str, spec: LaunchSpec) -> bool:
    """Whether the launcher is handed all stages at once (`run_whole`) and not one after the other
    (`run`)."""
    return launcher == "kubernetes" or (
        launcher == "slurm" and spec.batch is not None and spec.batch.chain == "array"
    )


def run(launcher: str, pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Run groups of workers by their names, one of them as "", with the named launcher (a key of
    LAUNCHERS) to their end; returns the exit code, 128 + n for signal n. Only some launchers take
    several groups: those with `run_pools`."""
    module = import_module(LAUNCHERS[launcher])
    if len(pools) == 1:
        return int(module.run(next(iter(pools.values())), view))
    return int(module.run_pools(pools, view))


def run_whole(launcher: str, stages: Sequence[Mapping[str, LaunchSpec]], view: ProgressView) -> int:
    """Hand all stages to a launcher that takes them at once; returns the exit code."""
    return int(import_module(LAUNCHERS[launcher]).run_stages(stages, view))
