"""Draw lives of a run whose broken nodes are repaired later: spare nodes, or fewer replicas.

At a failure a spare takes the place of the broken node. Without one the run waits for the first
repair, or, where it is elastic, goes on with one replica less and pays the recovery again when it
grows back.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from wm_train.plan.scaling.goodput import DAY_S, Failures, Saving, useful_share


@dataclass(frozen=True)
class Repair:
    """Describe how long a node is away, lognormal in hours, and what stands in for it.

    replicas: data-parallel replicas that an elastic run may do without, one at a time; 0: it waits.
    """

    median_hours: float = 24.0
    sigma: float = 1.0  # of the logarithm
    spares: int = 0
    replicas: int = 0

    @property
    def mean_hours(self) -> float:
        return self.median_hours * float(np.exp(self.sigma**2 / 2))


@dataclass(frozen=True)
class Fleet:
    """Hold the shares of time of drawn lives on a fleet with repairs: useful steps (mean, 5th and
    95th percentile), waiting for a node, and capacity missing in a smaller world."""

    mean: float
    low: float
    high: float
    waiting: float
    smaller: float


def expected_broken(failures: Failures, repair: Repair, nodes: int) -> float:
    """Return how many nodes are away on average, by Little's law: failures a day x days away."""
    return failures.per_node_day * nodes * repair.mean_hours / 24


def enough_spares(failures: Failures, repair: Repair, nodes: int) -> int:
    """Return spares that suffice nearly always: the nodes away on average and three times the root
    of that, as their number is about Poisson's."""
    away = expected_broken(failures, repair, nodes)
    return int(np.ceil(away + 3 * np.sqrt(away)))


def draw_fleet(
    failures: Failures,
    saving: Saving,
    repair: Repair,
    nodes: int,
    days: float,
    lives: int = 200,
    seed: int = 0,
) -> Fleet:
    """Draw lives and return the shares of time of useful steps, of waiting and of smaller worlds.

    All nodes, running or spare, are as good as new after repair; only running ones fail, at a rate
    that does not change while a replica is missing. Losses at a failure besides waiting are those
    of `useful_share`.
    """
    generator = np.random.default_rng(seed)
    base, length = useful_share(failures, saving, nodes), days * DAY_S
    results = []
    for _ in range(lives):
        waited, smaller = _one_life(failures, repair, nodes, length, generator)
        regrown = smaller[1] * failures.recovery_s  # growing back is one more recovery each
        worked = (length - waited - smaller[0] - regrown) / length
        results.append((max(0.0, base * worked), waited / length, smaller[0] / length))
    useful, waiting, small = np.array(results).T
    low, high = np.quantile(useful, (0.05, 0.95))
    means = (useful.mean(), low, high, waiting.mean(), small.mean())
    return Fleet(*(float(value) for value in means))


def _one_life(
    failures: Failures, repair: Repair, nodes: int, length: float, generator: np.random.Generator
) -> tuple[float, tuple[float, int]]:
    """Return the seconds that one life waits for a node, and the seconds of whole capacity that
    missing replicas cost with the number of times that one came back."""
    rate = failures.rate(nodes)
    now, waited, cost, returns, missing, spares = 0.0, 0.0, 0.0, 0, 0, repair.spares
    back: list[float] = []  # when nodes in repair come back
    while rate > 0:
        upcoming = now + generator.exponential(1 / rate)
        while back and back[0] <= min(upcoming, length):
            moment = heapq.heappop(back)
            cost += missing * (moment - now) / max(repair.replicas, 1)
            now = moment
            if missing:
                missing, returns = missing - 1, returns + 1
            else:
                spares += 1
        cost += missing * (min(upcoming, length) - now) / max(repair.replicas, 1)
        now = upcoming
        if now >= length:
            break
        away = repair.median_hours * 3600 * np.exp(repair.sigma * generator.standard_normal())
        heapq.heappush(back, now + float(away))
        if spares:
            spares -= 1
        elif missing < repair.replicas - 1:
            missing += 1
        else:
            moment = min(heapq.heappop(back), length)
            waited, now = waited + moment - now, moment
    return waited, (cost, returns)
