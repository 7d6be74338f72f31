"""Find what to change: replicas where flat sharding waits for latency, and how often to save."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from parallel.degrees import divisors, sequence_degrees, sequence_size
from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT
from wm_train.plan.device_memory import micro_batches
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.scaling.points import Assumptions
from wm_train.plan.search.candidates import Candidate, Shape
from wm_train.plan.search.moving import device_bytes, on_shards
from wm_train.plan.search.ranking import usable
from wm_train.plan.speed.report import mean_seconds, times_of
from wm_train.plan.speed.step import step_time

GAIN = 0.95  # of the step's time: what saves less is not worth a line


def advice_lines(
    plan: StagePlan, made: Mapping[str, Rehearsal], device: Hardware, parameters: int
) -> list[str]:
    """Return proposals for a stage that was rehearsed. parameters: of all networks that train."""
    if not made or plan.config.parallel.precision == "fp32":
        return []
    lines = replica_lines(plan, made, device)
    seconds = mean_seconds(plan, times_of(plan, made, device))
    assumed = Assumptions()
    nodes = -(-plan.launcher.workers // device.node_devices)
    saving = assumed.saving(assumed.failures(), nodes, parameters)
    steps = max(1, ceil(saving.interval_s / seconds))
    own = plan.config.trainer.checkpoint_every
    every = f"every {steps:,} steps, {steps * seconds / 60:.3g} minutes"
    every += f" (trainer.checkpoint_every={steps}; it is {own:,})"
    if steps >= plan.config.steps:
        every = "at its end alone, which comes before a save is due"
    return [
        *lines,
        f"  save {every}: the best with {assumed.per_node_day:g} failures per node and day on"
        f" {nodes:,} nodes, a save that blocks for {assumed.blocking_s:g} s and is valid after"
        f" {saving.valid_after_s:.3g} s",
    ]


def replica_lines(plan: StagePlan, made: Mapping[str, Rehearsal], device: Hardware) -> list[str]:
    """Return a line with the number of replicas that makes the step of a single network faster than
    flat sharding does; none where it does not, or where replicas are configured already."""
    parallel, workers = plan.config.parallel, plan.launcher.workers
    if parallel.dp_replicate > 1 or list(made) != [STUDENT]:
        return []
    config, base = plan.config, made[STUDENT]
    ring, ulysses = sequence_degrees(parallel, config.model.needs().heads)
    shape = Shape(ring, ulysses, config.model.activation_checkpointing)
    groups = workers // sequence_size(parallel)
    blocks = max(1, config.model.blocks()[0]) * micro_batches(plan)

    def seconds(replicas: int) -> float:
        moved = on_shards(base, workers, Candidate(shape, replicas, groups // replicas, 1, 1))
        if device_bytes(moved, config) > usable(device):
            return float("inf")
        return step_time(moved, device, blocks, parallel.compile).seconds

    times = {replicas: seconds(replicas) for replicas in divisors(groups)}
    best = min(times, key=lambda replicas: (times[replicas], replicas))
    if best == 1 or times[best] > GAIN * times[1]:
        return []
    return [
        f"  parallel.dp_replicate={best}: {times[best]:.3g} s a step instead of {times[1]:.3g},"
        f" as collectives of weights over {workers:,} ranks wait for latency"
    ]
