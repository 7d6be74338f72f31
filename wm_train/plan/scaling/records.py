"""Read failures, recovery and saves from a stage's records, for the simulator of goodput.

`starts.jsonl` says when each start began, after which step, and how many steps it repeats;
`metrics.jsonl` when each step ended and how long it took. Between two steps of one start everything
that is no step counts as saving. When a run failed is not recorded: it is reckoned from the last
step before the checkpoint and the steps that are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from wm_train.plan.scaling.goodput import DAY_S, Failures, Saving, Share, draw_lives
from wm_train.tracking.goodput import read_life, read_starts
from wm_train.tracking.rows import read_rows

METRICS = "metrics.jsonl"
LIVES = 1000


@dataclass(frozen=True)
class Recorded:
    """Hold what a stage has lived through since its first step began: days, the share of them in
    useful steps, and what the simulator needs to draw lives like it, on one node."""

    days: float
    share: float
    starts: int
    failures: Failures
    saving: Saving

    def drawn(self, seed: int = 0) -> Share:
        """Return the shares of lives that are drawn with these failures and saves."""
        return draw_lives(self.failures, self.saving, 1, self.days, LIVES, seed)


def recorded(folder: Path, checkpoint_every: int) -> Recorded | None:
    """Return what the records of a stage's folder say; None where it has not ended, or has too few
    steps to tell."""
    life, starts = read_life(folder), read_starts(folder)
    path = folder / METRICS
    rows = [row for row in read_rows(path)[0] if "step_s" in row] if path.exists() else []
    if life is None or not life.ended or life.goodput is None or len(rows) < 2 or not starts:
        return None
    begun = rows[0]["time"] - rows[0]["step_s"]
    seconds = life.ended - begun - life.paused_s
    step_s, gap_s = per_step(rows, [start["time"] for start in starts])
    detect, restart = recoveries(rows, starts, gap_s)
    again = len(starts) - 1
    failures = Failures(again / seconds * DAY_S, detect_s=detect, restart_s=restart)
    saving = Saving(checkpoint_every * step_s, checkpoint_every * (gap_s - step_s))
    return Recorded(seconds / DAY_S, life.productive_s / seconds, len(starts), failures, saving)


def per_step(rows: Sequence[Mapping[str, Any]], starts: Sequence[float]) -> tuple[float, float]:
    """Return the mean seconds of a step, and with everything between it and the step before, over
    steps that followed each other in one start."""
    steps, gaps = [], []
    for before, row in pairwise(rows):
        if any(before["time"] < start <= row["time"] for start in starts):
            continue
        steps.append(row["step_s"])
        gaps.append(max(row["time"] - before["time"], row["step_s"]))
    count = max(1, len(steps))
    return sum(steps) / count, sum(gaps) / count


def recoveries(
    rows: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], gap_s: float
) -> tuple[float, float]:
    """Return the median seconds from a failure to the next start, and from a start to its first
    step, of all starts but the first; gap_s: of a step with what surrounds it."""
    ended = {row["step"]: row["time"] for row in rows}
    first = {row["step"]: row["time"] - row["step_s"] for row in rows}
    limits = [*(start["time"] for start in starts[1:]), float("inf")]
    waits, loads = [], []
    for start, limit in list(zip(starts, limits, strict=True))[1:]:
        began = first.get(start["step"] + 1, limit)
        if start["time"] <= began < limit:  # else a later start repeated this step
            loads.append(began - start["time"])
        if start["step"] in ended:
            failed = ended[start["step"]] + start["redone"] * gap_s
            waits.append(max(0.0, start["time"] - failed))
    return median(waits) if waits else 0.0, median(loads) if loads else 0.0


def share_lines(found: Recorded | None) -> list[str]:
    """Return the line about measured and drawn useful shares, none without records."""
    if found is None:
        return []
    drawn, hours = found.drawn(), found.days * 24
    return [
        f"  useful share: measured {found.share:.1%} of {hours:.3g} h in {found.starts} starts;"
        f" lives drawn with its failures and saves {drawn.mean:.1%} ({drawn.low:.1%} to"
        f" {drawn.high:.1%})"
    ]
