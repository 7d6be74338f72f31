"""Plan a recipe on any number of devices: step time, MFU, useful share, days and cost.

Meshes are the best by formula (`wm_train/plan/search/`). What is assumed beside them is in
`Assumptions`, which is printed and drawn next to the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parallel.degrees import divisors, sequence_size
from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.plan.latents import Frame
from wm_train.plan.scaling.goodput import DAY_S, Failures, Saving, best_interval_s, useful_share
from wm_train.plan.scaling.spares import Repair, enough_spares
from wm_train.plan.search.ranking import Bases, Ranked, mesh_words, search
from wm_train.plan.search.report import bases_of, no_search, reads_on_host, share_words
from wm_train.plan.search.turns import TurnBases
from wm_train.plan.speed.step import FIDELITY

STATE_BYTES = 16  # of a parameter in a checkpoint: fp32 weight, both moments and average
RATES = (2.34e-3, 6.50e-3)  # failures per node and day of two published clusters: the band


@dataclass(frozen=True)
class Assumptions:
    """Hold what a scaling picture assumes: failures and recovery, saving, and the price of a
    device and hour. Failures per node and day are those of Llama 3, the band is that of RSC's two
    clusters; seconds, rate and price are assumed."""

    per_node_day: float = 3.79e-3
    detect_s: float = 60.0
    restart_s: float = 240.0
    blocking_s: float = 1.0
    store_rate: float = 5e9  # bytes per second that the store takes from all ranks
    price: float = 2.5  # of a device and hour

    def failures(self, per_node_day: float | None = None) -> Failures:
        """Return how nodes fail."""
        rate = self.per_node_day if per_node_day is None else per_node_day
        return Failures(rate, detect_s=self.detect_s, restart_s=self.restart_s)

    def saving(self, failures: Failures, nodes: int, parameters: int) -> Saving:
        """Return how checkpoints are saved: at the best interval."""
        valid = STATE_BYTES * parameters / self.store_rate
        never = Saving(1.0, self.blocking_s, valid)
        interval = best_interval_s(failures, never, nodes, shortest_s=valid)
        return Saving(interval, self.blocking_s, valid)

    def lines(self) -> list[str]:
        """Return the assumptions in words."""
        return [
            f"step time and MFU: {FIDELITY}; the best mesh that fits beside 3 GiB for"
            " the runtime (assumed), by formula",
            "batch: the recipe's while it feeds the devices at its cp, then one clip a sequence"
            " group of that cp, or of the next larger one that divides the devices; steps shrink so"
            " that clips in all stay the same: nothing is said of the loss",
            f"failures: {self.per_node_day:g} per node and day (Llama 3), band {RATES[0]:g} to"
            f" {RATES[1]:g} (RSC); {self.detect_s:g} s to detect, {self.restart_s:g} s to restart"
            " (assumed)",
            f"saving: {self.blocking_s:g} s of blocking at the best interval, a store of"
            f" {self.store_rate / 1e9:g} GB/s (assumed); spares enough that none is waited for",
            f"price: {self.price:g} per device and hour (assumed); spare nodes are paid, too",
        ]


@dataclass(frozen=True)
class StagePoint:
    """Hold one stage on a number of devices: its best mesh, batch, steps, and days of steps."""

    stage: str
    ranked: Ranked
    batch: int
    steps: float

    @property
    def days(self) -> float:
        return self.steps * self.ranked.time.seconds / DAY_S


@dataclass(frozen=True)
class Point:
    """Hold a recipe on a number of devices. share, low, high: of time in useful steps; days: from
    start to end with failures; cost: in the unit of the price."""

    devices: int
    stages: list[StagePoint]
    share: float
    low: float
    high: float
    interval_s: float
    spares: int
    days: float
    cost: float


def points_of(
    plans: Sequence[StagePlan],
    frames: Mapping[str, Frame],
    hardware: Hardware,
    counts: Sequence[int],
    assumed: Assumptions,
    processes: int = 1,
) -> tuple[list[Point], list[str]]:
    """Return a point for each number of devices on which all stages run, and a line for each stage
    or number that is left out. Prints on standard error which number is under way."""
    left_out, bases = [], dict[str, Bases | TurnBases]()
    for plan in plans:
        if not (reason := no_search(plan)):
            own = bases_of(plan, frames[plan.stage], hardware, processes)
            reason = reads_on_host(own)
        if reason:
            left_out.append(f"stage {plan.stage} is left out: {reason}")
        else:
            bases[plan.stage] = own
    points, parameters = [], max((one.parameters() for one in bases.values()), default=0)
    for devices in counts if bases else ():
        print(f"searching the meshes of {devices:,} devices", file=sys.stderr, flush=True)
        stages = [on_devices(one, devices) for one in bases.values()]
        missing = [name for name, found in zip(bases, stages, strict=True) if found is None]
        if missing:
            left_out.append(f"{devices:,} devices are left out: no mesh for {', '.join(missing)}")
            continue
        found = [one for one in stages if one is not None]
        points.append(point_of(found, devices, hardware, assumed, parameters))
    return points, left_out


def on_devices(bases: Bases | TurnBases, devices: int) -> StagePoint | None:
    """Return a stage on so many devices, None where no mesh trains it."""
    config = bases.plan.config
    size, batch = sequence_size(config.parallel), config.global_batch
    if devices > batch * size:
        groups = devices // min((n for n in divisors(devices) if n >= size), default=devices)
        batch = -(-batch // groups) * groups
    grown = bases.with_batch(batch)
    found = search(grown, devices, count=1, rehearsed=False).best
    if not found:
        return None
    return StagePoint(bases.plan.stage, found[0], batch, config.steps * config.global_batch / batch)


def point_of(
    stages: list[StagePoint],
    devices: int,
    hardware: Hardware,
    assumed: Assumptions,
    parameters: int,
) -> Point:
    """Return the point of stages that follow each other on the same devices."""
    nodes = -(-devices // hardware.node_devices)
    failures = assumed.failures()
    saving = assumed.saving(failures, nodes, parameters)
    share, low, high = (
        useful_share(assumed.failures(rate), saving, nodes)
        for rate in (assumed.per_node_day, RATES[1], RATES[0])
    )
    days = sum(one.days for one in stages) / share
    spares = enough_spares(failures, Repair(), nodes)
    paid = devices + spares * hardware.node_devices
    cost = paid * days * 24 * assumed.price
    return Point(devices, stages, share, low, high, saving.interval_s, spares, days, cost)


def table(points: Sequence[Point]) -> list[str]:
    """Return the points as lines of a table: a line per number of devices, and one per stage."""
    lines = ["  devices  useful share (band)   save every   spares     days          cost"]
    for one in points:
        band = f"{one.share:.3f} ({one.low:.3f} to {one.high:.3f})"
        every = "never" if np.isinf(one.interval_s) else f"{one.interval_s:,.0f} s"
        row = f"  {one.devices:7,}  {band:22}{every:>10}{one.spares:9}{one.days:9.2f}"
        lines.append(f"{row}{one.cost:14,.0f}")
        for stage in one.stages:
            time, mesh = stage.ranked.time, mesh_words(stage.ranked.candidate)
            lines.append(
                f"           {stage.stage}: {time.seconds:.3g} s a step of {stage.batch:,} clips,"
                f" MFU {share_words(time.mfu)}, {stage.days:.3g} days; {mesh}"
            )
    return lines
