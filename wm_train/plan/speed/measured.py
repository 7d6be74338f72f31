"""Measure rates of this device, and real steps of shallow models: what fidelity T1 stands on.

A step runs in a world in name, so one device measures the work of one rank of any mesh. On a host
seconds are those of the processor, which other jobs do not change much; between two probes, since
its speed changes. A median whose repeats differ by more than SPREAD is inconclusive, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from wm_train.backends.protocol import Backend
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT, Turn
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import example_batch, open_shapes, world_in_name
from wm_train.training.networks import build_networks
from wm_train.training.step import add_gradients
from wm_train.world import World

SPREAD = 1.3


@dataclass(frozen=True)
class Seconds:
    """Hold repeats of one measurement."""

    repeats: tuple[float, ...]

    @property
    def value(self) -> float:
        return median(self.repeats)

    @property
    def spread(self) -> float:
        """Return the largest repeat over the smallest."""
        return max(self.repeats) / max(min(self.repeats), 1e-12)

    @property
    def conclusive(self) -> bool:
        return self.spread <= SPREAD


def clock(backend: Backend) -> Callable[[], float]:
    """Return a clock of this device: of the processor on a host, else of the wall, once queued work
    is done."""
    if backend.device.type == "cpu":
        return time.process_time

    def now() -> float:
        backend.synchronize()
        return time.perf_counter()

    return now


def timed(call: Callable[[], object], now: Callable[[], float], repeats: int = 5) -> Seconds:
    """Return the seconds of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = now()
        call()
        found.append(now() - start)
    return Seconds(tuple(found))


def probe(now: Callable[[], float], device: torch.device) -> float:
    """Return the seconds of a fixed piece of work: eight products and eight passes over memory."""
    a = torch.ones(256, 256, device=device)
    b = torch.ones(1 << 20, device=device)
    start = now()
    for _ in range(8):
        a = (a @ a).clamp_(max=1.0)
        b = b.mul_(1.0)
    return now() - start


class RealStep:
    """Hold the state of a stage's step on this device, to be taken again and again. Use it inside
    `world_in_name`; the rates of its collectives are not real."""

    def __init__(self, plan: StagePlan, frame: Frame, backend: Backend, world: World) -> None:
        self.stage = open_shapes(plan, frame, world, backend)
        self.state = build_networks(plan, self.stage.mesh.fsdp, backend.device)
        batch = example_batch(self.stage, frame)
        self.batch = batch.each_tensor(lambda x: x.to(backend.device))

    def take(self, role: str = STUDENT) -> None:
        """Take one step: gradients and the optimizer."""
        for own in (self.state, *self.state.roles.values()):
            own.optimizer.zero_grad(set_to_none=True)
        add_gradients(self.stage, self.state, self.batch, Turn(role, 0))
        self.state.of(role).optimizer.step()


def step_seconds(
    plans: Sequence[StagePlan], frame: Frame, backend: Backend, rounds: int = 3
) -> list[Seconds]:
    """Return the seconds of a real step of each plan, which all have the same workers; measured in
    rounds, each beside a probe, so that a machine that slows down slows all of them."""
    now = clock(backend)
    with world_in_name(plans[0].launcher.workers, 0) as world:
        steps = [RealStep(plan, frame, backend, world) for plan in plans]
        for one in steps:
            one.take()
        found: list[list[float]] = [[] for _ in steps]
        probes = []
        for _ in range(rounds):
            for one, own in zip(steps, found, strict=True):
                before = probe(now, backend.device)
                start = now()
                one.take()
                taken = now() - start
                around = (before + probe(now, backend.device)) / 2
                probes.append(around)
                own.append(taken / around)
    scale = median(probes)
    return [Seconds(tuple(value * scale for value in own)) for own in found]
