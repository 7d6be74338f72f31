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
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launch.local_ray import LocalRay
from launch.pools import run_together
from launch.progress import ProgressView
from launch.restart import Death, Growth, run_attempts
from launch.signals import ASKING, Caught, caught
from launch.spec import INTERRUPTED, USER_ERROR, LaunchSpec
from launch.token import TokenError, protect_local_ray

CONNECT_S = 10  # to a cluster that should be running


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

    # on a laptop the workers may share cores
    cpus = sum(spec.workers * spec.cpus_per_worker for spec in pools.values())
    local = None if address else LocalRay(max(os.cpu_count() or 1, cpus))
    code = 1
    with caught() as stop:
        try:
            problem = _connect(address, view) if address else local.start(view) if local else ""
        except SystemExit:  # Ray's own handler, while it starts
            problem, stop.number = "", stop.number or signal.SIGTERM
        try:
            if problem:
                view.text(problem)
                return USER_ERROR
            with caught(stop):  # Ray has put its own handler in the place of ours
                pools = {name: replace(spec, address=address) for name, spec in pools.items()}
                code = _run_placed_pools(pools, view, stop, local)
            return code
        finally:
            if local:
                local.end(keep_logs=code not in (0, *(INTERRUPTED + number for number in ASKING)))
            ray.shutdown()


def _run_placed_pools(
    pools: Mapping[str, LaunchSpec], view: ProgressView, stop: Caught, local: LocalRay | None
) -> int:
    def run_one(spec: LaunchSpec, part: ProgressView, stop: Caught) -> int:
        from launch.attempt import NoRoomError, run_attempt

        def attempt(
            spec: LaunchSpec, number: int, view: ProgressView, stop: Caught
        ) -> Death | Growth | None:
            problem = local.mend(view) if local else ""
            if problem:
                raise NoRoomError(problem)
            return run_attempt(spec, number, view, stop, local.broken if local else str)

        try:
            return run_attempts(spec, part, attempt, stop=stop)
        except NoRoomError as error:
            part.text(str(error))
            return 1

    if stop.number is not None or len(pools) == 1:
        return run_one(next(iter(pools.values())), view, stop)
    return run_together(pools, view, run_one)


def _connect(address: str, view: ProgressView) -> str:
    """Join a cluster; return an error message, or ""."""
    import ray

    if wrong := refused(address):
        return "joining Ray: got {}, expected {}. Fix: {}".format(*wrong)
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


def refused(address: str) -> tuple[str, str, str] | None:
    """Return what is wrong with an address to join, the rule and the fix; None if nothing is."""
    scheme, _, rest = address.rpartition("://")
    if not scheme:
        return None
    host = re.sub(r":\d*$", "", rest.split("/")[0]) or "<host>"
    job_server = "that is the job server's, for `ray job submit --address`"
    meant = {
        "ray": "that is Ray Client's, which cannot watch the workers of a run",
        "http": job_server,
        "https": job_server,
    }.get(scheme.lower(), "Ray has no such scheme")
    return (
        f"{address}: {meant}",
        "host:port of the cluster's head, as `ray start --head` prints it",
        f"RAY_ADDRESS={host}:6379, or unset RAY_ADDRESS for a Ray of its own",
    )


def _unreachable(address: str) -> str:
    """Return the reason why nothing answers at host:port, or "".

    Ray itself would try for five minutes.
    """
    host, _, port = address.rpartition(":")
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
