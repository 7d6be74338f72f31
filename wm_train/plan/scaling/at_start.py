"""Print at the start of a run on several nodes how often to save, and where replicas help.

Nothing is rehearsed here, so that a start does not wait: seconds of a step come from the stage's
own record where it has one. `python -m wm_train.plan --hardware <profile>` says more.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from statistics import median

from wm_train.backends.hardware import hardware
from wm_train.config.curriculum import StagePlan
from wm_train.plan.scaling.goodput import Failures, Saving, best_interval_s
from wm_train.plan.speed.network import collective_s, group_of, network_of
from wm_train.tracking.rows import read_rows

METRICS = "metrics.jsonl"
DEVICE = "h100"  # whose nodes and latencies are assumed
PER_NODE_DAY = 3.79e-3  # failures, of Llama 3
BLOCKING_S = 1.0  # that a save stops training, assumed
SLOW_S = 5e-3  # latency of a collective of weights that is worth a line


def start_lines(plan: StagePlan) -> list[str]:
    """Return the proposals for a stage; none for one that fits on a node."""
    device, workers = hardware(DEVICE), plan.launcher.workers
    nodes = max(plan.launcher.nodes, -(-workers // device.node_devices))
    if nodes < 2:
        return []
    best = best_interval_s(Failures(PER_NODE_DAY), Saving(1.0, BLOCKING_S), nodes)
    own = plan.config.trainer.checkpoint_every
    step_s = recorded_step_s(plan)
    every = f"{best / 60:.3g} minutes"
    if step_s:
        steps = max(1, ceil(best / step_s))
        every = f"{steps:,} steps, {every} (trainer.checkpoint_every={steps}; it is {own:,})"
    lines = [
        f"stage {plan.stage}: save about every {every}: best with {PER_NODE_DAY:g} failures per"
        f" node and day on {nodes:,} nodes and saves that stop training for {BLOCKING_S:g} s"
    ]
    shards = workers // plan.config.parallel.dp_replicate
    wait = collective_s("gather", 0, group_of(shards, 1, device.node_devices), network_of(device))
    if wait > SLOW_S:
        lines.append(
            f"stage {plan.stage}: weights are sharded over {shards:,} ranks, {wait * 1e3:.3g} ms of"
            " latency in each of their collectives; python -m wm_train.plan with --hardware"
            " proposes parallel.dp_replicate"
        )
    return lines


def print_proposals(pools: Iterable[Iterable[StagePlan]]) -> None:
    """Print the proposals for the stages of all pools."""
    for line in (line for stages in pools for plan in stages for line in start_lines(plan)):
        print(f"proposal: {line}", flush=True)


def recorded_step_s(plan: StagePlan) -> float | None:
    """Return the median seconds of the steps that the stage has recorded, None without any."""
    path = plan.directory / METRICS
    if not path.is_file():
        return None
    found = [row["step_s"] for row in read_rows(path)[0] if row.get("step_s")]
    return median(found) if found else None
