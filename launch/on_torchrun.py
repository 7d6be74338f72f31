"""Run workers under torchrun: one agent here, or the same command on each of several machines.

The agents of several machines rendezvous at an endpoint. torchrun places and watches workers;
restarts are done here (max_restarts=0 there), because torchrun would also retry after a user's
mistake, and its own exit code says nothing.
"""

from __future__ import annotations

import re
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from launch.child import Child
from launch.leash import leashed_to_anybody
from launch.pools import run_together
from launch.progress import ProgressView
from launch.restart import Death, cause, run_attempts
from launch.signals import Caught
from launch.spec import AGENT, TAIL, LaunchSpec, fill, on_this_machine
from launch.torchrun_agent import ALONE

# prefix of a worker's message about a failure that it understands
TOLD = re.compile(r"rank (\d+) on \S+: ")
# In torchrun's closing report, for each rank that failed; the one that did so first comes last,
# under this title.
FAILURE = re.compile(
    r"^ *time\s*: (\S+)$.*?^ *rank\s*: (\d+).*?^ *exitcode\s*: (-?\d+)", re.DOTALL | re.MULTILINE
)
FIRST = "Root Cause"
# torchrun asks the others to leave once it has seen a failure, and kills them 30 s later
ONE_LOOK_S = 5.0
REPORT_LINES = 80


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
    last: deque[str] = deque(maxlen=REPORT_LINES)
    told: dict[int, str] = {}
    asked_at: float | None = None
    code: int | None = None
    while code is None:
        lines, code = agent.wait(0.5, for_lines=True)
        last.extend(lines)
        for line in lines:
            view.feed(line)
            if found := TOLD.match(line):
                told[int(found[1])] = line
        if stop.number is not None and asked_at is None:
            asked_at = time.monotonic()
            agent.process.terminate()  # the agent forwards it to its workers and waits for them
        if asked_at is not None and time.monotonic() - asked_at > spec.grace_s + 5:
            code = agent.stop(0.0)
    if code == 0:
        return None
    death = reported("\n".join(last))
    if death is None:
        return Death(0, code, "\n".join(list(last)[-TAIL:]))
    # repeated below the output of its peers and of torchrun
    return replace(death, said=told.get(death.rank, ""))


def reported(text: str) -> Death | None:
    """Return the root cause among the deaths in torchrun's closing report, None without one."""
    others, title, first = text.partition(FIRST)
    found = [
        (datetime.strptime(when, "%Y-%m-%d_%H:%M:%S"), Death(int(rank), int(code), ""))
        for when, rank, code in (FAILURE.findall(first) + FAILURE.findall(others) if title else ())
    ]
    if not found:
        return None
    begun, root = found[0]
    by_themselves = [
        death
        for when, death in found[1:]
        if (when - begun).total_seconds() < ONE_LOOK_S and death.code != -signal.SIGTERM
    ]
    return cause([root, *by_themselves])
