"""Wrap private APIs of Ray that `launch` uses, each with the versions it was read in."""

from __future__ import annotations

from ray._private import accelerators, worker


def accelerator_resources() -> set[str]:
    """Return Ray's resource names for accelerators of any vendor, such as GPU. Ray 2.60."""
    return set(accelerators.get_all_accelerator_resource_names())


def ended_parts() -> list[str]:
    """Return the kinds of processes of a Ray that this process has started and that have ended,
    such as raylet. Ray 2.60."""
    node = worker._global_node
    return [] if node is None else [str(kind) for kind, _ in node.dead_processes()]
