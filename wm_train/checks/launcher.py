"""Judge the launcher: what it can start, and what its scheduler would refuse."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import launch
from wm_train.backends import names
from wm_train.config.problems import Problem
from wm_train.config.rules import one_of
from wm_train.config.schema import LauncherConfig, RunConfig
from wm_train.kernels.names import ATTENTION


def launcher_problems(config: RunConfig) -> list[Problem]:
    """Return problems of the launcher's choice, its workers and nodes, and of the backend's."""
    launcher = config.launcher
    return [
        *_choices(config),
        *_worker_problems(launcher),
        *_endpoint_problems(launcher),
        *_address_problems(launcher),
        *_shrinking_problems(config),
        *(_kubernetes_problems(config) if launcher.name == "kubernetes" else ()),
    ]


def _choices(config: RunConfig) -> Iterator[Problem]:
    """Yield names that are in no table."""
    backend = config.backend
    for key, value, choices in (
        ("launcher.name", config.launcher.name, launch.names()),
        ("backend.name", backend.name, names()),
        ("backend.attention", backend.attention, ATTENTION),
    ):
        if value not in choices:
            yield Problem(key, repr(value), one_of(*choices).words)


def _worker_problems(launcher: LauncherConfig) -> Iterator[Problem]:
    workers, nodes = launcher.workers, launcher.nodes
    if launcher.name == "inline" and workers > 1:
        fix = "launcher.workers=1, or launcher=ray"
        yield Problem("launcher.workers", str(workers), "1 with launcher=inline", fix)
    if nodes > 1 and launcher.name not in ("torchrun", "slurm", "kubernetes"):
        rule = f"1 with launcher={launcher.name}"
        yield Problem("launcher.nodes", str(nodes), rule, "launcher=torchrun")
    runner = launcher.slurm.runner if launcher.name == "slurm" else launcher.name
    if nodes > 1 and workers % nodes and runner == "torchrun":
        rule = f"a multiple of the {nodes} nodes, as torchrun starts as many on each"
        yield Problem("launcher.workers", str(workers), rule, f"launcher.workers={nodes}")


def _endpoint_problems(launcher: LauncherConfig) -> Iterator[Problem]:
    if launcher.nodes == 1 or launcher.name != "torchrun":
        return
    fix = "launcher.endpoint=<first node>:29400"
    found = re.fullmatch(r"([^:\s/]+):(\d{1,5})", launcher.endpoint or "")
    if found is None or not 0 < int(found[2]) < 2**16:
        rule = "host:port of one of the nodes, the same on all of them"
        yield Problem("launcher.endpoint", repr(launcher.endpoint), rule, fix)
        return
    try:
        socket.getaddrinfo(found[1], int(found[2]), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter: a label of over 63 letters
        rule = "a host that this machine can resolve; an address needs no resolver"
        got = f"{launcher.endpoint} ({error})"
        fix = f"launcher.endpoint=<address of the first node>:{found[2]}"
        yield Problem("launcher.endpoint", got, rule, fix)


def _address_problems(launcher: LauncherConfig) -> Iterator[Problem]:
    """Yield the address of another service in the place of a Ray cluster's."""
    from launch.on_ray import refused

    if launcher.name != "ray":
        return
    given = {
        "launcher.address": launcher.address,
        "RAY_ADDRESS": None if launcher.address else os.environ.get("RAY_ADDRESS"),
    }
    for where, address in given.items():
        if address and (wrong := refused(address)):
            yield Problem(where, *wrong)


def _shrinking_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield a least number of workers that the mesh cannot shrink to."""
    least, workers = config.launcher.min_workers, config.launcher.workers
    meshes = [config.parallel, *(stage.parallel for stage in config.recipe.stages.values())]
    fixed = any(mesh.dp_shard is not None for mesh in meshes)
    if least is not None and (not 1 <= least <= workers or fixed):
        rule = "1 to launcher.workers, with parallel.dp_shard=null so that the mesh can shrink"
        fix = "launcher.min_workers=1 parallel.dp_shard=null"
        yield Problem("launcher.min_workers", str(least), rule, fix)


def _kubernetes_problems(config: RunConfig) -> Iterator[Problem]:
    pods = config.launcher.kubernetes
    for key in ("image", "claim"):
        if not getattr(pods, key):
            where = f"launcher.kubernetes.{key}"
            yield Problem(where, "nothing", "a name", f"{where}=<name>")
    for key, path in (("out", config.out), ("data.path", config.data.path)):
        if "://" not in path and not Path(path).is_relative_to(pods.mount):
            rule = (
                f"a folder below {pods.mount}, which all pods share (key launcher.kubernetes.mount)"
            )
            yield Problem(key, path, rule, f"{key}={pods.mount}/<folder>")
    if pods.devices and not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+:[1-9]\d*", pods.devices):
        rule = "resource:count, as the cluster's device plugin names it"
        where = "launcher.kubernetes.devices"
        yield Problem(where, repr(pods.devices), rule, "<vendor.com/device>:8")
