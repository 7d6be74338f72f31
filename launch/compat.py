"""Wrap private APIs of Ray that `launch` uses, each with the versions it was read in."""

from __future__ import annotations

from ray._private import accelerators


def accelerator_resources() -> set[str]:
    """Return Ray's resource names for accelerators of any vendor, such as GPU. Ray 2.60."""
    return set(accelerators.get_all_accelerator_resource_names())
