"""Build the view of a run that the page's template draws: words and shapes, no more files."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from wm_train.report.curves import (
    Chart,
    Line,
    Points,
    finite_points,
    make_chart,
    running_mean,
    thin,
)
from wm_train.report.media import Clip, embed
from wm_train.report.record import RunRecord, StageRecord
from wm_train.report.settings import as_yaml, changed, mesh_of
from wm_train.report.verdict import judged_view
from wm_train.report.words import figure, lasting, size_of, status_of, when

MOST_VIDEOS = 16  # of a stage in the page


def run_view(run: RunRecord, now: float) -> dict[str, Any]:
    """Return the top of the page, and its stages as `stages`."""
    newest = run.newest
    recipe, model = newest.config["recipe"].get("name"), newest.config.get("model", {}).get("name")
    many = len(run.stages)
    parts = [f"recipe {recipe}", f"model {model}", f"{many} stage{'s' if many > 1 else ''}"]
    parts.append(f"last sign of life {when(newest.last_seen)}")
    top = {
        "name": run.name,
        "status": status_of(newest, now),
        "summary": " · ".join(parts),
        "footer": f"Made {when(now)} from {run.folder.absolute()}. This page needs no network.",
    }
    return {"run": top, "stages": [stage_view(stage, now) for stage in run.stages]}


def stage_view(stage: StageRecord, now: float) -> dict[str, Any]:
    """Return the section of one stage."""
    title = " / ".join(part for part in (stage.pool, stage.name) if part)
    samples, left = videos(stage.samples, stage.folder)
    workers = stage.starts[-1]["workers"] if stage.starts else None
    return {
        "id": "stage-" + "-".join(part for part in (stage.pool, stage.name) if part),
        "title": title,
        "status": status_of(stage, now),
        "steps": steps_words(stage),
        "loss": figure(held_out(stage)[-1][1]) if held_out(stage) else "",
        "summary": stage_summary(stage),
        "warnings": warnings(stage),
        "figures": figures(stage),
        "samples": samples,
        "samples_left": left,
        "samples_words": "Held-out clips. Above the decoded truth; below what the model makes of"
        " its first frame and camera path.",
        "sheet": embed(stage.contact_sheet) if stage.contact_sheet else None,
        "judged": judged_view(stage.judged, stage.folder) if stage.judged else None,
        "charts": charts(stage),
        "time_words": time_words(stage),
        "shares": shares(stage),
        "mesh": mesh_of(stage.plan, workers) if stage.plan and workers else "",
        "starts": starts_table(stage),
        "checkpoints": [
            {
                "name": saved.name,
                "time": when(saved.time),
                "size": size_of(saved.size),
                "loss": figure(saved.validation_loss),
                "workers": "–" if saved.workers is None else saved.workers,
                "problem": saved.problem,
            }
            for saved in reversed(stage.checkpoints)
        ],
        "kept_elsewhere": stage.kept_elsewhere,
        "typed": typed_lines(stage),
        "settings": changed(stage.plan) if stage.plan else [],
        "yaml": as_yaml(stage.config),
    }


def typed_lines(stage: StageRecord) -> list[dict[str, str]]:
    """Return the commands that started the stage as they would be typed, oldest first."""
    command = "python -m wm_train.launch"
    return [
        {"time": when(row["time"]), "line": shlex.join([*command.split(), *row["typed"]])}
        for row in stage.typed
    ]


def videos(paths: Sequence[Path], folder: Path) -> tuple[list[Clip], str]:
    """Return the first videos for the page, and a sentence about the others."""
    others = len(paths) - MOST_VIDEOS
    words = f"{others} more are in {(folder / 'samples').absolute()}." if others > 0 else ""
    return [embed(path) for path in paths[:MOST_VIDEOS]], words


def column(stage: StageRecord, key: str) -> Points:
    """Return (step, figure) of a column of the record, where it has one."""
    return [(float(row["step"]), float(row[key])) for row in stage.rows if key in row]


def held_out(stage: StageRecord) -> Points:
    return finite_points(column(stage, "validation_loss"))


def steps_words(stage: StageRecord) -> str:
    wanted = stage.settings.get("steps")
    return f"{stage.steps_done:,} of {wanted:,} steps" if wanted else f"{stage.steps_done:,} steps"


def stage_summary(stage: StageRecord) -> str:
    """Return a line about what is trained."""
    own = stage.settings
    parts = [
        f"{own.get('frames')} frames",
        f"{own.get('global_batch')} clips a step",
        f"objective {own.get('objective', {}).get('name')}",
        f"optimizer {own.get('optimizer', {}).get('name')}",
    ]
    if own.get("inherit"):
        parts.append(f"weights from {own['inherit']}")
    return " · ".join(parts)


def warnings(stage: StageRecord) -> list[str]:
    """Return what a reader must know before the figures."""
    said = []
    skipped = sum(bool(row.get("skipped")) for row in stage.rows)
    if skipped:
        said.append(f"{skipped} steps were skipped by the step guard.")
    said += [
        f"Steps {first} to {last} were left out after going back." for first, last in stage.rewound
    ]
    if stage.damaged:
        said.append(f"{stage.damaged} lines of the record are damaged and left out.")
    if stage.plan is None:
        said.append("The configuration is of another version: settings and mesh are not shown.")
    return said


def figures(stage: StageRecord) -> list[dict[str, str]]:
    """Return the key figures: label, value, hint."""
    if not stage.rows:
        return []
    found = [tile("steps", f"{stage.steps_done:,}", f"of {stage.settings.get('steps', 0):,}")]
    if points := held_out(stage):
        best = min(points, key=lambda point: point[1])
        lowest = f"lowest {figure(best[1])} at step {best[0]:.0f}"
        hint = "the lowest so far" if best == points[-1] else lowest
        found.append(tile("held-out loss", figure(points[-1][1]), hint))
    if means := running_mean(finite_points(column(stage, "loss"))):
        found.append(tile("training loss", figure(means[-1][1]), "over the last 5 % of steps"))
    if stage.wall_s > 0 and stage.useful_s <= stage.wall_s + 1:
        hint = f"{lasting(stage.useful_s)} of {lasting(stage.wall_s)}"
        found.append(tile("goodput", f"{stage.useful_s / stage.wall_s:.1%}", hint))
    if speeds := finite_points(column(stage, "frames_per_s")):
        found.append(
            tile("speed", f"{figure(median(y for _, y in speeds), 3)}", "frames/s, median")
        )
    if peaks := finite_points(column(stage, "memory_peak_bytes")):
        found.append(tile("peak memory", size_of(max(y for _, y in peaks)), "of the first worker"))
    return found


def tile(label: str, value: str, hint: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "hint": hint}


def charts(stage: StageRecord) -> list[Chart]:
    """Return the curves of a stage."""
    marks = [float(row["step"]) for row in stage.starts[1:]]
    loss = finite_points(column(stage, "loss"))
    lines = [
        Line("each step", thin(loss), "faint"),
        Line("mean of 5 %", thin(running_mean(loss))),
        Line("held out", column(stage, "validation_loss"), "dots", 1),
    ]
    made = [
        make_chart("Loss", lines, marks=marks),
        make_chart("Held-out loss by noise level", by_noise_level(stage), marks=marks),
        make_chart("Gradient norm", [Line("", thin(column(stage, "grad_norm")))], marks=marks),
        make_chart("Learning rate", [Line("", thin(column(stage, "lr")))], marks=marks, log=False),
        make_chart(
            "Speed",
            [Line("", thin(column(stage, "frames_per_s")))],
            unit="frames/s",
            marks=marks,
            log=False,
        ),
    ]
    return [chart for chart in made if chart]


def by_noise_level(stage: StageRecord) -> list[Line]:
    """Return the held-out loss at the lowest, the middle and the highest noise level over the
    steps."""
    prefix = "validation_loss_sigma_"
    names = {key for row in stage.rows if "validation_loss" in row for key in row}
    levels = sorted(
        (name for name in names if name.startswith(prefix)), key=lambda n: float(n[len(prefix) :])
    )
    if len(levels) < 2 or len(held_out(stage)) < 2:
        return []
    picked = dict.fromkeys((levels[0], levels[len(levels) // 2], levels[-1]))
    return [
        Line(f"σ {name[len(prefix) :]}", column(stage, name), colour=place)
        for place, name in enumerate(picked)
    ]


def time_words(stage: StageRecord) -> str:
    """Return a sentence about where the time went."""
    if stage.wall_s <= 0:
        return ""
    count = stage.life.starts if stage.life else len(stage.starts)
    said = (
        f"{lasting(stage.wall_s)} since the first start, {count} start{'s' if count != 1 else ''}"
    )
    if stage.life and stage.life.redone_steps:
        said += f", {stage.life.redone_steps} steps done again"
    comm = finite_points(column(stage, "comm_share"))
    waits = median(y for _, y in comm) if comm else 0.0
    if waits >= 0.005:
        said += f"; {waits:.0%} of a step waits in communication"
    return f"{said}."


def shares(stage: StageRecord) -> list[dict[str, Any]]:
    """Return the parts of the time: `kind`, `size` and `label`."""
    wall, useful = stage.wall_s, stage.useful_s
    if wall <= 0 or useful > wall + 1 or not math.isfinite(wall + useful):
        return []
    rest = max(wall - useful, 0.0)
    return [
        {"kind": "useful", "size": useful, "label": f"useful steps {lasting(useful)}"},
        {
            "kind": "rest",
            "size": rest,
            "label": f"starts, saves, held-out loss, samples, downtime {lasting(rest)}",
        },
    ]


def starts_table(stage: StageRecord) -> list[dict[str, Any]]:
    """Return the starts, each with the step that it reached before the next one."""
    rows = []
    for start, after in zip_longest(stage.starts, stage.starts[1:]):
        reached = stage.steps_done if after is None else after["step"] + after.get("redone", 0)
        rows.append(
            {
                "time": when(start.get("time", 0.0)),
                "step": f"{start['step']:,}",
                "reached": f"{max(reached, start['step']):,.0f}",
                "redone": f"{start.get('redone', 0):,}",
                "workers": f"{start.get('workers', 1)}",
            }
        )
    return rows
