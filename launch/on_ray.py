"""Run workers on Ray: join a cluster or start a local one, and restart all ranks when one dies.

It uses Ray core actors in a placement group, not Ray Train: Train takes some 20 s to its first
step, runs the loop inside its own actor and reports an exception where a run has an exit code. Here
every rank is a process of its own, with the environment that torchrun would give it, so a worker
does not know which launcher started it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launch.pools import run_together
from launch.progress import ProgressView
from launch.restart import run_attempts
from launch.signals import Caught
from launch.spec import USER_ERROR, LaunchSpec
from launch.token import TokenError, protect_local_ray

CONNECT_S = 10  # to a cluster that should be running
STARTS = 3  # attempts to start a local Ray


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Run `spec` to its end; return the exit code.

    0, the exit code of the worker that ended the run (1 if its node was lost), or 128 + signal.
    """
    return run_pools({"": spec}, view)


def run_pools(pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Run several groups of workers on one cluster, see `launch.pools`."""
    # read when ray is imported, and by the processes that it starts
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = next(iter(pools.values())).address or os.environ.get("RAY_ADDRESS")
    try:
        if not address:
            protect_local_ray()
    except TokenError as error:
        view.text(str(error))
        return USER_ERROR
    import ray

    problem = _connect(
        address, sum(spec.workers * spec.cpus_per_worker for spec in pools.values()), view
    )
    if problem:
        view.text(problem)
        return USER_ERROR
    pools = {name: replace(spec, address=address) for name, spec in pools.items()}
    try:
        return (
            run_together(pools, view, _run_placed)
            if len(pools) > 1
            else _run_placed(next(iter(pools.values())), view, None)
        )
    finally:
        ray.shutdown()


def _run_placed(spec: LaunchSpec, view: ProgressView, stop: Caught | None) -> int:
    from launch.attempt import NoRoomError, run_attempt

    try:
        return run_attempts(spec, view, run_attempt, stop=stop)
    except NoRoomError as error:
        view.text(str(error))
        return 1


def _connect(address: str | None, cpus: int, view: ProgressView) -> str:
    """Join or start Ray; return an error message, or ""."""
    import ray

    if not address:
        # on a laptop the workers may share cores
        return _start_local(max(os.cpu_count() or 1, cpus), view)
    reason = _unreachable(address)
    if not reason:
        try:
            context: Any = ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason:
        fix = "`ray start --head`, or leave RAY_ADDRESS and launcher.address unset"
        if not _token_authentication():
            fix += (
                "; a cluster with token authentication is joined with RAY_AUTH_MODE=token in the"
                " environment"
            )
        return f"joining Ray: got {reason}, expected a cluster at {address}. Fix: {fix}"
    dashboard = context.address_info.get("webui_url") or ""
    if dashboard and not on_loopback(dashboard) and not _token_authentication():
        ray.shutdown()
        return (
            f"joining Ray: got a dashboard at {dashboard} without authentication, expected one on"
            " loopback: it lets anybody who reaches it run code. Fix: `ray start"
            " --dashboard-host=127.0.0.1 ...`, or RAY_AUTH_MODE=token on every node"
        )
    view.text(f"joined the Ray cluster at {address}")
    return ""


def _start_local(cpus: int, view: ProgressView) -> str:
    """Start Ray on this machine alone; return an error message, or "".

    Its processes choose their own ports. If another program takes one first, all of them start
    again.
    """
    import ray

    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return ""
        # there is no narrower class: Ray raises Exception itself when one of its processes has died
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            ray.shutdown()
            if left:
                view.text(f"starting Ray: got {reason}; trying again")
    return (
        f"starting Ray: got {reason} {STARTS} times, expected a Ray on this machine. Fix: its logs"
        " below /tmp/ray, or launcher=torchrun"
    )


def _unreachable(address: str) -> str:
    """Return the reason why nothing answers at host:port, or "".

    Ray itself would try for five minutes.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return ""  # `auto` and the like: Ray looks for the cluster itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return str(error)
    return ""


def _token_authentication() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def on_loopback(endpoint: str) -> bool:
    """Return True if an endpoint is reachable from this machine only."""
    host = endpoint.split("//")[-1].rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
