"""Plan one training step block by block on lanes that run beside each other.

Lanes: the host launches operators; the device computes; weights are gathered for the next block;
gradients are reduced; collectives over a sequence group stop the computation. The order is that of
FSDP2: one block is gathered ahead, its weights are freed after use, and a block's gradients are
reduced while the next computes, which may not end before the reduction ahead of its own has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Lane = Literal["host", "compute", "gather", "reduce", "sequence"]


@dataclass(frozen=True)
class Part:
    """Describe one block in one phase, in seconds: of the device, of the host that launches it, of
    gathering its weights, of the collectives that it waits for, of reducing its gradients."""

    compute: float
    host: float = 0.0
    gather: float = 0.0
    sequence: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Interval:
    """Hold when a lane was busy with which part, in seconds from the start."""

    lane: Lane
    part: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """Hold a simulated step: its end in seconds, and what every lane did."""

    end: float
    intervals: list[Interval] = field(repr=False)

    def busy(self, lane: Lane) -> float:
        """Return the seconds in which a lane was busy."""
        return sum(one.end - one.start for one in self.intervals if one.lane == lane)


def simulate(parts: Sequence[Part], ahead: bool = True, slowdown: float = 0.0) -> Simulated:
    """Return the step of these parts in order.

    ahead: collectives of weights and gradients run beside the computation; otherwise each is waited
    for. slowdown: the computation takes 1 + slowdown times as long while such a collective runs.
    """
    done: list[Interval] = []
    host = computed = gathered = reduced = 0.0  # until when each lane is busy
    before = 0.0  # when the part before the last one's gradients were reduced
    started = 0.0  # when the computation of the part before began
    for number, part in enumerate(parts):
        asked = started if ahead else max(computed, reduced)
        begun = max(gathered, asked)
        gathered = begun + part.gather
        done.append(Interval("gather", number, begun, gathered))
        launch = host
        host += part.host
        done.append(Interval("host", number, launch, host))
        ready = max(computed, gathered, launch, before if ahead else reduced)
        waited = ready + part.sequence
        done.append(Interval("sequence", number, ready, waited))
        # the next part's weights are gathered from the start of this one
        coming = parts[number + 1].gather if ahead and number + 1 < len(parts) else 0.0
        beside = [(ready, ready + coming), (waited, reduced)] if ahead else []
        finished = _slowed(waited, part.compute, beside, slowdown)
        done.append(Interval("compute", number, waited, finished))
        started, computed, before = ready, max(finished, host), reduced
        if part.reduce:
            start = max(computed, reduced)
            reduced = start + part.reduce
            done.append(Interval("reduce", number, start, reduced))
    return Simulated(max(computed, reduced), done)


def _slowed(
    start: float, work: float, beside: Sequence[tuple[float, float]], slowdown: float
) -> float:
    """Return when `work` seconds end that begin at `start` and are slowed in some intervals."""
    moments = sorted({t for interval in beside for t in interval if t > start})
    now = start
    for moment in moments:
        middle = (now + moment) / 2
        rate = 1 / (1 + slowdown) if any(a < middle < b for a, b in beside) else 1.0
        if (moment - now) * rate >= work:
            return now + work / rate
        work -= (moment - now) * rate
        now = moment
    return now + work
