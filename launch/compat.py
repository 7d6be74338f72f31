"""Wrap private APIs of Ray that `launch` uses, each with the versions it was read in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import accelerators, utils, worker


def accelerator_resources() -> set[str]:
    """Return Ray's resource names for accelerators of any vendor, such as GPU. Ray 2.60."""
    return set(accelerators.get_all_accelerator_resource_names())


def ended_parts() -> list[str]:
    """Return the kinds of processes of a Ray that this process has started and that have ended,
    such as raylet. Ray 2.60."""
    node = worker._global_node
    return [] if node is None else [str(kind) for kind, _ in node.dead_processes()]


@contextmanager
def command_line_as_utf8() -> Iterator[None]:
    """Let Ray start where the locale cannot read the command line: Ray sends it along as text, and
    fails with bytes that Python has kept as surrogates. Ray 2.60."""
    known = utils.get_entrypoint_name
    utils.get_entrypoint_name = lambda: (
        known().encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    )
    try:
        yield
    finally:
        utils.get_entrypoint_name = known
