"""Predict the share of time in useful steps of a run whose nodes fail: by formula and drawn lives.

A run works for `interval_s`, saves, and works on. At a failure it loses what no valid checkpoint
holds, and needs time until it trains again; a failure in that time starts it anew. With a constant
rate of failures the span between two of them holds k whole cycles of work and save with probability
exp(-rate (recovery + valid_after + k cycle)), so that in the long run

    share = rate interval exp(-rate (recovery + valid_after)) / (exp(rate cycle) - 1)

For rare failures this is 1 / ((1 + blocking / interval) (1 + rate (recovery + interval / 2 +
valid_after))), the form of the published estimates. Drawn lives add the spread between lives and
the hours by cause; `wm_train/plan/scaling/spares.py` adds nodes that wait for repair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY_S = 86400.0
HOUR_S = 3600.0


@dataclass(frozen=True)
class Failures:
    """Describe how often nodes fail, and how long the phases until the next step take, in seconds.

    per_node_day: failures that stop the run, per node and day. Published: 3.79e-3 (Llama 3, 54
    days of 16,384 H100), 2.34e-3 and 6.5e-3 (two clusters of RSC).
    """

    per_node_day: float
    detect_s: float = 0.0
    replace_s: float = 0.0
    restart_s: float = 0.0
    load_s: float = 0.0

    @property
    def recovery_s(self) -> float:
        return self.detect_s + self.replace_s + self.restart_s + self.load_s

    def rate(self, nodes: int) -> float:
        """Return the failures per second of a run on so many nodes."""
        return self.per_node_day * nodes / DAY_S


@dataclass(frozen=True)
class Saving:
    """Describe the checkpoints of a run, in seconds: one per `interval_s` of training, which stops
    training for `blocking_s` and is valid `valid_after_s` later."""

    interval_s: float
    blocking_s: float = 0.0
    valid_after_s: float = 0.0


@dataclass(frozen=True)
class Share:
    """Hold the share of time in useful steps over drawn lives: mean, 5th and 95th percentile, and
    the mean hours of a life that went into each other cause."""

    mean: float
    low: float
    high: float
    lost_hours: dict[str, float]
    failures: float  # mean number in a life

    @property
    def error(self) -> float:
        """Return half the width of the band from the 5th to the 95th percentile."""
        return (self.high - self.low) / 2


def useful_share(failures: Failures, saving: Saving, nodes: int) -> float:
    """Return the expected share of time in useful steps in the long run, by the formula above."""
    rate = failures.rate(nodes)
    cycle = saving.interval_s + saving.blocking_s
    if rate == 0:
        return saving.interval_s / cycle
    recovered = np.exp(-rate * (failures.recovery_s + saving.valid_after_s))
    return float(rate * saving.interval_s * recovered / np.expm1(rate * cycle))


def best_interval_s(failures: Failures, saving: Saving, nodes: int, shortest_s: float = 0) -> float:
    """Return the seconds between checkpoints with the largest share; infinite if nothing fails.

    It solves 1 - exp(-rate (interval + blocking)) = rate interval, which is about √(2 blocking /
    rate) (Young's rule). The result is not below the time in which a save becomes valid, nor below
    `shortest_s`, such as the bytes of a checkpoint over the store's rate.
    """
    rate = failures.rate(nodes)
    if rate == 0:
        return float("inf")
    interval = np.sqrt(2 * saving.blocking_s / rate)
    for _ in range(20 if saving.blocking_s else 0):  # Newton's rule; the function is concave
        kept = np.exp(-rate * (interval + saving.blocking_s))
        interval -= (1 - kept - rate * interval) / (rate * kept - rate)
    return float(max(interval, saving.valid_after_s, shortest_s))


def draw_lives(
    failures: Failures, saving: Saving, nodes: int, days: float, lives: int = 1000, seed: int = 0
) -> Share:
    """Draw lives of a run of `days` days and return what they lost.

    Between failures time is exponential. One that comes while the run still recovers starts the
    recovery again. A checkpoint counts once it is valid.
    """
    length = days * DAY_S
    gaps = _gaps(failures.rate(nodes), length, lives, np.random.default_rng(seed))
    ends = np.minimum(np.cumsum(gaps, axis=1), length)
    spans = np.diff(ends, axis=1, prepend=0.0)  # [lives, failures + 1], seconds; 0 after the end
    is_last = np.cumsum(gaps, axis=1) >= length
    recovering = np.full_like(spans, failures.recovery_s)
    recovering[:, 0] = 0.0  # the first span begins with the run itself
    recovering = np.minimum(recovering, spans)
    running = spans - recovering
    useful, saves = _kept_work(running, saving, is_last)
    lost = running - useful - saves
    shares = useful.sum(1) / length
    means = {"save": saves, "lost work": lost, "recovery": recovering}
    low, high = np.quantile(shares, (0.05, 0.95))
    return Share(
        mean=float(shares.mean()),
        low=float(low),
        high=float(high),
        lost_hours={name: float(values.sum(1).mean() / HOUR_S) for name, values in means.items()},
        failures=float((ends < length).sum(1).mean()),
    )


def _gaps(
    rate: float, length: float, lives: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw times between failures, [lives, n] in seconds, enough to fill `length` in each life."""
    if rate == 0:
        return np.full((lives, 1), np.inf)
    expected = rate * length
    count = int(expected + 8 * np.sqrt(expected) + 16)
    gaps = generator.exponential(1 / rate, (lives, count))
    while (gaps.sum(1) < length).any():
        gaps = np.hstack([gaps, generator.exponential(1 / rate, (lives, count))])
    return gaps


def _kept_work(
    running: NDArray[np.float64], saving: Saving, is_last: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the seconds of work that a checkpoint holds, and those spent saving it, for spans of
    `running` seconds; the span at a life's end keeps all of its work."""
    cycle = saving.interval_s + saving.blocking_s
    whole = np.floor(np.maximum(running - saving.valid_after_s, 0) / cycle)
    begun = np.floor(running / cycle)
    last = np.where(is_last, running - begun * cycle, 0.0)  # of the cycle that the end cuts
    tail = np.minimum(last, saving.interval_s)
    useful = np.where(is_last, begun * saving.interval_s + tail, whole * saving.interval_s)
    saves = np.where(is_last, running - useful, whole * saving.blocking_s)
    return useful, saves
