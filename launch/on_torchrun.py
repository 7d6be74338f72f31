"""Run workers under torchrun: one agent here, or the same command on each of several machines.

The agents of several machines rendezvous at an endpoint. torchrun places and watches workers;
restarts are done here (max_restarts=0 there), because torchrun would also retry after a user's
mistake, and its own exit code says nothing.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launch.child import Child
from launch.leash import leashed_to_anybody
from launch.pools import run_together
from launch.progress import ProgressView
from launch.restart import Death, cause, run_attempts
from launch.signals import Caught
from launch.signed import FAILURES, VARIABLE, parse
from launch.spec import AGENT, LaunchSpec, fill, on_this_machine
from launch.torchrun_agent import ALONE

# prefix of a worker's message about a failure that it understands
TOLD = re.compile(r"rank (\d+) on \S+: ")
# torchrun asks the others to leave once it has seen a failure, and kills them 30 s later
ONE_LOOK_S = 5.0


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Run `spec.workers` workers over `spec.nodes` machines to their end.

    Returns the exit code of the worker that failed first, or 0.
    """
    return run_attempts(spec, view, run_attempt)


def run_pools(pools: Mapping[str, LaunchSpec], view: ProgressView) -> int:
    """Run several groups of workers on this machine, see `launch.pools`."""
    return run_together(
        pools, view, lambda spec, part, stop: run_attempts(spec, part, run_attempt, stop=stop)
    )


def torchrun_command(spec: LaunchSpec, attempt: int) -> list[str]:
    """Return the agent's command line; each attempt of a run has its own rendezvous id."""
    if spec.nodes == 1:
        meeting = [ALONE]
    else:
        assert spec.endpoint is not None
        meeting = [
            f"--nnodes={spec.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={spec.endpoint}",
            f"--rdzv-id={spec.logs.parent.name}-{attempt}",
        ]
    worker = leashed_to_anybody(fill(spec.command, str(spec.config_path)))
    return [
        *fill(AGENT, ""),
        *meeting,
        f"--nproc-per-node={spec.workers // spec.nodes}",
        "--max-restarts=0",
        "--no-python",
        *worker,
    ]


def run_attempt(spec: LaunchSpec, number: int, view: ProgressView, stop: Caught) -> Death | None:
    """Run one agent from start to end.

    The output of its workers is not marked by rank; as long as all is well only rank 0 prints.
    """
    view.text(
        f"{spec.workers} workers under torchrun"
        + (f", meeting at {spec.endpoint}" if spec.nodes > 1 else "")
    )
    log = spec.logs / f"attempt_{number}" / "all_ranks.log"
    variables = {**(on_this_machine() if spec.nodes == 1 else {}), **spec.environment}
    agent = Child(torchrun_command(spec, number), variables, spec.directory, log)
    failures: Sequence[Mapping[str, Any]] = ()
    told: dict[int, str] = {}
    asked_at: float | None = None
    code: int | None = None
    while code is None:
        lines, code = agent.wait(0.5, for_lines=True)
        for line in lines:
            text, report = parse(line, spec.environment.get(VARIABLE, ""), FAILURES)
            if report is not None:
                failures = report
            else:
                view.feed(text)
            if found := TOLD.match(line):
                told[int(found[1])] = line
        if stop.number is not None and asked_at is None:
            asked_at = time.monotonic()
            agent.process.terminate()  # the agent forwards it to its workers and waits for them
        if asked_at is not None and time.monotonic() - asked_at > spec.grace_s + 5:
            code = agent.stop(0.0)
    if code == 0:
        return None
    if not failures:
        return Death(0, code, "\n".join(agent.tail))
    death = reported(failures)
    # repeated below the output of its peers and of torchrun
    return replace(death, said=told.get(death.rank, ""))


def reported(failures: Sequence[Mapping[str, Any]]) -> Death:
    """Return the root cause among the agent's failures, the first of which came first."""
    root, *others = failures
    by_themselves = [
        failure
        for failure in others
        if failure["time"] - root["time"] < ONE_LOOK_S and failure["code"] != -signal.SIGTERM
    ]
    death = cause([Death(one["rank"], one["code"], "") for one in (root, *by_themselves)])
    assert death is not None
    return death
