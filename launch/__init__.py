"""Place workers: a `LaunchSpec` goes in, an exit code comes out.

This package knows nothing about training and imports no other package of this repository.
`launch/README.md` is the guide for operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

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
GROUP = "launch.launchers"  # entry points of other packages: name -> module
LATER = ("kubernetes", "slurm")  # these only prepare or queue the work


def names() -> tuple[str, ...]:
    """Return the names of all launchers: ours, then those of other packages."""
    return (*LAUNCHERS, *sorted(entry_points(group=GROUP).names - set(LAUNCHERS)))


def _module(launcher: str) -> Any:
    """Import a launcher. Raises ValueError for one that two packages add, or none."""
    if launcher in LAUNCHERS:
        return import_module(LAUNCHERS[launcher])
    points = tuple(entry_points(group=GROUP, name=launcher))
    if len(points) != 1:
        raise ValueError(
            f"launcher failed to load: got {launcher}, which {len(points)} packages add, expected"
            " one (key launcher.name). Fix: install one of them"
        )
    return points[0].load()


def takes_all_stages(launcher: str, spec: LaunchSpec) -> bool:
    """Return True if the launcher gets all stages at once (`run_whole`), not one by one (`run`)."""
    return launcher == "kubernetes" or (
        launcher == "slurm" and spec.batch is not None and spec.batch.chain == "array"
    )


def run(launcher: str, pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Run groups of workers with the named launcher (one of `names`); return the exit code.

    pools: name -> group; a single group is named "". The exit code is 128 + n for signal n. Only
    launchers with `run_pools` take several groups.
    """
    module = _module(launcher)
    if launcher not in LATER:  # the token is in no file: what is queued meets another view
        pools = {
            name: replace(spec, environment={**spec.environment, **view.variables})
            for name, spec in pools.items()
        }
    if len(pools) == 1:
        return int(module.run(next(iter(pools.values())), view))
    return int(module.run_pools(pools, view))


def run_whole(launcher: str, stages: Sequence[Mapping[str, LaunchSpec]], view: ProgressView) -> int:
    """Hand all stages to a launcher that takes them at once; return the exit code."""
    return int(_module(launcher).run_stages(stages, view))
