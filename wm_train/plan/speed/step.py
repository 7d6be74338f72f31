"""Predict the seconds of a training step from a rehearsal: costs of its work, laid on lanes."""

from __future__ import annotations

from dataclasses import dataclass

from wm_train.backends.hardware import Hardware
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.speed.collectives import Lane
from wm_train.plan.speed.costs import Seconds, forward_flops, seconds_of
from wm_train.plan.speed.lanes import Part, simulate

FIDELITY = "spec, ±30 %: data sheets and counted work, nothing measured"
FORWARD, BACKWARD = "activations", "backward"
SLOWDOWN = 0.15  # of computation beside a collective inside a node; Calculon's charge, not measured


@dataclass(frozen=True)
class StepTime:
    """Hold the predicted seconds of a step, its parts, and the share of the device's peak that the
    model's own FLOPs use: forward and twice that backward, without recomputation."""

    seconds: float
    compute: float
    sequence: float
    exposed: float  # what neither computation nor a sequence collective hides
    update: float
    mfu: float


def step_time(made: Rehearsal, hardware: Hardware, blocks: int, compiled: bool) -> StepTime:
    """Return the time of a rehearsed step whose work is spread evenly over `blocks` blocks."""
    seconds = seconds_of(made, hardware, compiled)
    parts = parts_of(seconds, max(1, blocks))
    step = simulate(parts, slowdown=SLOWDOWN)
    compute = seconds.compute()
    sequence = sum(part.sequence for part in parts)
    total = step.end + seconds.update
    own = 3 * forward_flops(made)
    exposed = step.end - compute - sequence
    return StepTime(total, compute, sequence, exposed, seconds.update, own / total / hardware.peak)


def parts_of(seconds: Seconds, blocks: int) -> list[Part]:
    """Return the parts of a step's passes, forward and backward, each in as many equal blocks."""

    def share(phase: str, lane: Lane) -> float:
        return seconds.collectives.get((phase, lane), 0.0) / blocks

    parts = []
    for phase in (FORWARD, BACKWARD):
        part = Part(
            compute=seconds.compute(phase) / blocks,
            host=seconds.launched.get(phase, 0.0) / blocks,
            gather=share(phase, "gather"),
            sequence=share(phase, "sequence"),
            reduce=share(phase, "reduce"),
        )
        parts += [part] * blocks
    return parts
