"""Compute goodput: the share of wall time since a stage's first start that went into useful steps.

All restarts are included. `life.json` in the stage's folder is written at every start and end, and
`starts.jsonl` has a line per start: when, after which step, on how many workers.
Repeated steps count once, skipped ones not at all; the rest is starting, saving, validating,
repeating steps, and downtime. The pause between the end of a stage and an extension of it is not
counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wm_train.console import process_age
from wm_train.redact import clean_text
from wm_train.storage import read_regular
from wm_train.tracking.rows import read_rows, to_line

NAME = "life.json"
STARTS = "starts.jsonl"
TYPED = "typed.jsonl"  # the words of each command that started the stage
CLOCK_S = 1.0  # by which clocks may differ


@dataclass(frozen=True)
class Life:
    """Store the record of a stage's starts and ends. Times are Unix seconds."""

    started: float
    starts: int = 0
    redone_steps: int = 0
    paused_s: float = 0.0
    status: str = "RUNNING"
    ended: float = 0.0
    productive_s: float = 0.0

    @property
    def wall_s(self) -> float:
        return self.ended - self.started - self.paused_s

    @property
    def goodput(self) -> float | None:
        """Return the share of useful time, None when a clock that was set back made it
        meaningless."""
        if self.wall_s <= 0 or self.productive_s > self.wall_s + CLOCK_S:
            return None
        return self.productive_s / self.wall_s

    def __str__(self) -> str:
        again = f", {self.redone_steps} steps done again" if self.redone_steps else ""
        starts = f"{self.starts} start{'s' if self.starts > 1 else ''}{again}"
        if self.goodput is None:
            steps = f"{self.productive_s:.1f} s of steps"
            return f"goodput unknown, as the clock was set back: {steps} ({starts})"
        return (
            f"goodput {self.goodput:.1%}: {self.productive_s:.1f} s of steps in {self.wall_s:.1f} s"
            f" ({starts})"
        )


def productive(row: Mapping[str, Any]) -> float:
    """Return the useful seconds of a step's record."""
    return 0.0 if row.get("skipped") else float(row.get("step_s", 0.0))


def read_life(folder: Path) -> Life | None:
    """Read `life.json` of a stage's folder; None if it is missing or damaged."""
    try:
        return Life(**json.loads(read_regular(folder / NAME)))
    except (OSError, ValueError, TypeError):  # only informative: a damaged file is started afresh
        return None


def write_life(folder: Path, life: Life) -> None:
    """Write `life.json` of a stage's folder in one step."""
    draft = folder / f"{NAME}.tmp-{os.getpid()}"
    draft.write_text(json.dumps(asdict(life)) + "\n")
    draft.replace(folder / NAME)


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a stage, oldest first: `time` (Unix seconds), `step` (the steps done
    until then), `workers`, and `redone`, the steps recorded before that had to be repeated."""
    path = folder / STARTS
    return read_rows(path)[0] if path.exists() else []


def note_typed(folder: Path, typed: Sequence[str]) -> None:
    """Add the words of a command to those that started the stage before, without secrets."""
    line = {"time": time.time(), "typed": [clean_text(word) for word in typed]}
    with (folder / TYPED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_typed(folder: Path) -> list[dict[str, Any]]:
    """Return the commands that started a stage, oldest first: `time` (Unix seconds) and `typed`,
    its words. Damaged lines are left out: they are only informative."""
    found = []
    try:
        lines = read_regular(folder / TYPED).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            found.append({"time": float(row["time"]), "typed": [str(w) for w in row["typed"]]})
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found


def begin_life(folder: Path, redone_steps: int, step: int = 0, workers: int = 1) -> Life:
    """Record one more start, after `step` steps and on `workers` processes, dated from the start of
    this process."""
    now = process_started()
    before = read_life(folder) or Life(now)
    pause = now - before.ended if before.status == "FINISHED" else 0.0
    life = replace(
        before,
        starts=before.starts + 1,
        redone_steps=before.redone_steps + redone_steps,
        status="RUNNING",
    )
    life = replace(life, paused_s=before.paused_s + max(pause, 0.0), ended=now)
    write_life(folder, life)
    with (folder / STARTS).open("a") as file:
        file.write(to_line({"step": step, "time": now, "workers": workers, "redone": redone_steps}))
    return life


def process_started() -> float:
    """Return the start of this process in Unix seconds."""
    return time.time() - process_age()
