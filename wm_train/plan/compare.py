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
from wm_train.config.curriculum import StagePlan, ordered, plan_stage
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.roles import turn_of
from wm_train.config.typed import from_json
from wm_train.plan.device_memory import turn_memories_of
from wm_train.plan.latents import Frame, frames_of
from wm_train.plan.scaling.records import recorded, share_lines
from wm_train.plan.speed.report import times_of, why_no_time
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
    folders = sorted(
        path.parent for path in folder.rglob(CONFIG) if (path.parent / METRICS).is_file()
    )
    if not folders:
        rule = f"a run's folder, in which a stage has left {CONFIG} and {METRICS}"
        print(Problem("--compare", str(folder), rule, "--compare runs/demo"), file=sys.stderr)
        return 2
    try:
        stages = [(stage, recorded_plan(stage)) for stage in folders]
        stages.sort(key=lambda one: one[1].config.index)
        frames = frames_of([plan for _, plan in stages], given)
        for (stage, plan), frame in zip(stages, frames, strict=True):
            print("\n".join(stage_lines(stage, plan, frame, profile, processes)), flush=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def recorded_plan(folder: Path) -> StagePlan:
    """Return the plan that a stage's folder records. Raises ConfigError where the folder has not
    the name of a stage, and for a configuration of another version."""
    run = from_json(read_regular(folder / CONFIG).decode())
    if folder.name not in run.recipe.stages:
        rule = f"a stage's folder under its own name, one of {', '.join(ordered(run.recipe))}"
        fix = "give the folder the name of its stage"
        raise ConfigError([Problem("--compare", str(folder), rule, fix)])
    return plan_stage(run, folder.name)


def stage_lines(
    folder: Path, plan: StagePlan, frame: Frame, profile: Hardware | None, processes: int = 1
) -> list[str]:
    """Return the lines of one stage's folder. Errors: those of `turn_memories_of`."""
    found = measured(plan, read_rows(folder / METRICS)[0])
    kind = likely_kind(plan.backend.name, plan.config.parallel.precision != "fp32")
    memories, _, made = turn_memories_of(plan, frame, kind, processes)
    planned = max(one.device for one in memories.values())
    lines = [f"stage {plan.config.index} {plan.stage}: {found.steps} steps recorded"]
    lines.append(memory_line(planned, found.peak, kind))
    why = why_no_time(plan, made) if profile else "--hardware names no profile"
    times = times_of(plan, made, profile) if profile and not why else {}
    for role, seconds in found.seconds.items():
        line = f"  time of a step, turn of the {role}: measured {seconds:.3g} s"
        if role in times:
            own = times[role].seconds
            line += f", planned {own:.3g} ({own / seconds - 1:+.0%}); a plan times"
            line += f" {seconds / own:.3g} is that of this kind of run (fidelity T2)"
        else:
            line += f"; planned: none, as {why}"
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
