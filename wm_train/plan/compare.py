"""Print the planned memory and time of a finished run beside what it measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from wm_train.backends.absent import likely_kind
from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan, plan_stage
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.roles import turn_of
from wm_train.config.typed import from_json
from wm_train.plan.device_memory import turn_memories_of
from wm_train.plan.latents import latent_frames
from wm_train.plan.scaling.records import recorded, share_lines
from wm_train.plan.speed.report import times_of
from wm_train.storage import read_regular
from wm_train.tracking.rows import read_rows

CONFIG, METRICS = "config.json", "metrics.jsonl"
WARM = 2  # first steps of a record, which also load and compile
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """Hold what the record of a stage says: the median seconds of a step by role, the most bytes
    that a rank held, and the median seconds in which a step waited for data."""

    steps: int
    seconds: Mapping[str, float]
    peak: float | None
    data_wait: float


def compare(
    folder: Path, given: Sequence[str], profile: Hardware | None, processes: int = 1
) -> int:
    """Print every stage of a run's folder, or the one stage whose folder it is; exit code 2 where
    there is none. given: values of --latent."""
    stages = sorted(
        path.parent for path in folder.rglob(CONFIG) if (path.parent / METRICS).is_file()
    )
    if not stages:
        rule = f"a run's folder, in which a stage has left {CONFIG} and {METRICS}"
        print(Problem("--compare", str(folder), rule, "--compare runs/demo"), file=sys.stderr)
        return 2
    try:
        for stage in stages:
            print("\n".join(stage_lines(stage, given, profile, processes)), flush=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def stage_lines(
    folder: Path, given: Sequence[str], profile: Hardware | None, processes: int = 1
) -> list[str]:
    """Return the lines of one stage's folder. Raises ConfigError as `latent_frames` does, and for a
    configuration of another version."""
    run = from_json(read_regular(folder / CONFIG).decode())
    plan = plan_stage(run, folder.name)
    frame = latent_frames([plan], given)[folder.name]
    found = measured(plan, read_rows(folder / METRICS)[0])
    kind = likely_kind(plan.backend.name, plan.config.parallel.precision != "fp32")
    memories, _, made = turn_memories_of(plan, frame, kind, processes)
    planned = max(one.device for one in memories.values())
    lines = [f"stage {plan.config.index} {plan.stage}: {found.steps} steps recorded"]
    lines.append(memory_line(planned, found.peak, kind))
    times = times_of(plan, made, profile) if profile and made else {}
    for role, seconds in found.seconds.items():
        line = f"  time of a step, turn of the {role}: measured {seconds:.3g} s"
        if role in times:
            own = times[role].seconds
            line += f", planned {own:.3g} ({own / seconds - 1:+.0%}); a plan times"
            line += f" {seconds / own:.3g} is that of this kind of run (fidelity T2)"
        else:
            line += "; planned: none, as --hardware names no profile"
        lines.append(line)
    lines.append(f"  waited for data: {found.data_wait:.3g} s a step")
    return [*lines, *share_lines(recorded(folder, plan.config.trainer.checkpoint_every))]


def memory_line(planned: int, peak: float | None, kind: str) -> str:
    """Return planned and measured memory; on a host what is measured is the whole process."""
    if peak is None:
        return f"  memory: planned {planned / GIB:.3f} GiB, measured nothing"
    if kind == "cpu":
        return (
            f"  memory: planned {planned / GIB:.3f} GiB of tensors; the process held"
            f" {peak / GIB:.3f} with its interpreter and libraries"
        )
    return (
        f"  memory: planned {planned / GIB:.2f} GiB, measured {peak / GIB:.2f}"
        f" ({planned / peak - 1:+.1%})"
    )


def measured(plan: StagePlan, rows: Sequence[Mapping[str, Any]]) -> Measured:
    """Return what the rows of a stage's record say."""
    steps = [row for row in rows if "step_s" in row and not row.get("skipped")]
    warm = steps[WARM:] or steps
    by_role: dict[str, list[float]] = {}
    for row in warm:
        role = turn_of(plan.config.turns, int(row["step"]) - 1).role
        by_role.setdefault(role, []).append(float(row["step_s"]))
    peaks = [float(row["memory_peak_bytes"]) for row in warm if "memory_peak_bytes" in row]
    waits = [float(row.get("data_wait_s", 0.0)) for row in warm]
    return Measured(
        len(steps),
        {role: median(values) for role, values in by_role.items()},
        max(peaks, default=None),
        median(waits) if waits else 0.0,
    )
