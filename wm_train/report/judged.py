"""Read the evaluation of a stage, `evaluation/evaluation.json`, as `wm_train.evaluate` writes it.

    {"step": 580, "poses": "map",
     "summary": {"rot_err_deg": {"unit": "degrees", "better": "less",
        "sample": SUMMARY, "ceiling": SUMMARY, "floor": SUMMARY, "other": SUMMARY,
        "gain": SUMMARY, "own_better": 0.94, "own_better_n": 16}},
     "seconds": {"rot_err_deg": {"sample": [SUMMARY], "floor": [SUMMARY]}},
     "clips": [{"key": "e1-t5", "scores": {"rot_err_deg": {"sample": SCORE, "floor": SCORE}}}]}

SUMMARY, over videos: {"mean": 1.9, "standard_error": 0.2, "interval": [1.5, 2.4], "n": 16,
"coverage": 0.94, "reason": ""}. SCORE, of a clip: {"value": 1.7, "coverage": 0.9, "reason": ""}.
ceiling: the decoded truth in the sample's place; floor: the first frame frozen; other: the sample
against another clip's truth; gain: how much better than the floor, clip by clip. Earlier steps are
in `step_<step>.json` beside it, pictures in `samples/<clip>.mp4` and `paths/<clip>.png`. A number
that lacks its interval, coverage, n, floor or ceiling is not shown: the reason is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER, NAME = "evaluation", "evaluation.json"
BESIDE = ("interval", "coverage", "n", "floor", "ceiling")  # without which no number is shown
COLUMNS = ("sample", "floor", "ceiling")


@dataclass(frozen=True)
class Measure:
    """Hold one measure of a checkpoint, with all that it must stand beside.

    value: None when it could not be measured, or lacks one of BESIDE; `reason` says so. more: more
    is better. gain: the mean and its standard error. own_better: the share of `own_better_n` clips.
    by_second: column -> the mean of each second of a clip.
    """

    name: str
    unit: str = ""
    more: bool = True
    value: float | None = None
    interval: tuple[float, float] | None = None
    coverage: float | None = None
    n: int | None = None
    floor: float | None = None
    ceiling: float | None = None
    other: float | None = None
    before: float | None = None
    gain: tuple[float | None, float | None] = (None, None)
    own_better: float | None = None
    own_better_n: int | None = None
    reason: str = ""
    by_second: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Hold the evaluation of a stage's checkpoint. clips: key -> measure -> (sample, floor,
    ceiling) of what is known of all three; before: the step of the evaluation before; problem: the
    reason why it could not be read, or ""."""

    step: int | None = None
    poses: str = ""
    measures: list[Measure] = field(default_factory=list)
    clips: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    before: int | None = None
    samples: list[Path] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    problem: str = ""


def read_judged(stage: Path) -> Judged | None:
    """Read the evaluation of a stage; None when there is none."""
    folder = stage / FOLDER
    if not folder.is_dir():
        return None
    samples = sorted((folder / "samples").glob("*.mp4"))
    paths = sorted((folder / "paths").glob("*.png"))
    try:
        plain = json.loads((folder / NAME).read_text(encoding="utf-8"))
        step = whole(plain["step"])
        before = read_before(folder, step)
        old = before.get("summary", {})
        seconds = plain.get("seconds", {})
        measures = [
            read_measure(name, row, old.get(name, {}), seconds.get(name, {}))
            for name, row in plain["summary"].items()
        ]
        clips = {str(clip["key"]): read_clip(clip["scores"]) for clip in plain["clips"]}
        poses, earlier = str(plain.get("poses", "")), whole(before.get("step"))
        return Judged(step, poses, measures, clips, earlier, samples, paths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{NAME} cannot be read ({type(error).__name__}: {error})"
        return Judged(samples=samples, paths=paths, problem=problem)


def read_before(folder: Path, step: int | None) -> Mapping[str, Any]:
    """Return the newest evaluation of an earlier step, an empty one without any."""
    names = {f"step_{earlier:08d}.json": earlier for earlier in steps_in(folder)}
    earlier = [name for name, at in names.items() if step is not None and at < step]
    found = json.loads((folder / max(earlier)).read_text(encoding="utf-8")) if earlier else {}
    return found if isinstance(found, dict) else {}


def steps_in(folder: Path) -> list[int]:
    """Return the steps of which evaluations are kept."""
    words = [file.stem.removeprefix("step_") for file in folder.glob("step_*.json")]
    return [int(word) for word in words if word.isdecimal()]


def read_measure(
    name: str,
    row: Mapping[str, Any],
    old: Mapping[str, Any],
    seconds: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Measure:
    """Return one measure, without its number when that does not stand beside all of BESIDE."""
    sample = row["sample"]
    interval = interval_of(sample.get("interval"))
    coverage, n = number(sample.get("coverage")), whole(sample.get("n"))
    floor, ceiling = mean_of(row, "floor"), mean_of(row, "ceiling")
    value, reason = number(sample.get("mean")), str(sample.get("reason") or "")
    beside = (interval, coverage, n, floor, ceiling)
    lacks = [key for key, known in zip(BESIDE, beside, strict=True) if known is None]
    if value is None:
        reason = reason or "not measured"
    elif lacks:
        value, reason = None, f"not shown without its {', '.join(lacks)}"
    gain = row.get("gain") or {}
    return Measure(
        name=name,
        unit=str(row.get("unit") or ""),
        more=row.get("better") == "more",
        value=value,
        interval=interval,
        coverage=coverage,
        n=n,
        floor=floor,
        ceiling=ceiling,
        other=mean_of(row, "other"),
        before=mean_of(old, "sample"),
        gain=(number(gain.get("mean")), number(gain.get("standard_error"))),
        own_better=number(row.get("own_better")),
        own_better_n=whole(row.get("own_better_n")),
        reason=reason,
        by_second={
            column: [number(second.get("mean")) for second in values]
            for column, values in seconds.items()
        },
    )


def read_clip(scores: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return (sample, floor, ceiling) of each measure of a clip that has all three."""
    found = {}
    for name, row in scores.items():
        values = [number((row.get(column) or {}).get("value")) for column in COLUMNS]
        known = tuple(value for value in values if value is not None)
        if len(known) == len(COLUMNS):
            found[name] = known
    return found


def mean_of(row: Mapping[str, Any], column: str) -> float | None:
    return number((row.get(column) or {}).get("mean"))


def interval_of(ends: Any) -> tuple[float, float] | None:
    """Return an interval of two known ends, else None."""
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = map(number, ends)
    return None if low is None or high is None else (low, high)


def number(value: Any) -> float | None:
    """Return a finite figure, None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def whole(value: Any) -> int | None:
    return value if type(value) is int else None
