"""Place workers: a `LaunchSpec` goes in, an exit code comes out.

This package knows nothing about training and imports no other package of this repository.
`launch/README.md` is the guide for operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.progress import ProgressView
    from launch.spec import LaunchSpec

# imported when used, as Ray takes a second
LAUNCHERS = {
    "inline": "launch.inline",
    "kubernetes": "launch.on_kubernetes",
    "ray": "launch.on_ray",
    "slurm": "launch.on_slurm",
    "torchrun": "launch.on_torchrun",
}
LATER = ("kubernetes", "slurm")  # these only prepare or queue the work


def takes_all_stages(launcher: str, spec: LaunchSpec) -> bool:
    """Return True if the launcher gets all stages at once (`run_whole`), not one by one (`run`)."""
    return launcher == "kubernetes" or (
        launcher == "slurm" and spec.batch is not None and spec.batch.chain == "array"
    )


def run(launcher: str, pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Run groups of workers with the named launcher (a key of LAUNCHERS); return the exit code.

    pools: name -> group; a single group is named "". The exit code is 128 + n for signal n. Only
    launchers with `run_pools` take several groups.
    """
    module = import_module(LAUNCHERS[launcher])
    if len(pools) == 1:
        return int(module.run(next(iter(pools.values())), view))
    return int(module.run_pools(pools, view))


def run_whole(launcher: str, stages: Sequence[Mapping[str, LaunchSpec]], view: ProgressView) -> int:
    """Hand all stages to a launcher that takes them at once; return the exit code."""
    return int(import_module(LAUNCHERS[launcher]).run_stages(stages, view))
