"""Build the view of an evaluation that the page's template draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wm_train.report.curves import Chart, Line, Points, make_chart
from wm_train.report.judged import Judged, Measure
from wm_train.report.media import embed
from wm_train.report.words import figure, with_error

MOST_PICTURES = 16
DIGITS = 3  # of a measure
MOST_COLUMNS = 6  # of the table per clip
EQUAL_DB = 100.0  # a PSNR of equal pictures, which is no end of a scale
LEGEND = (
    "Floor: the first frame frozen. Ceiling: the decoded truth. Gain: better than the floor, clip"
    " by clip. Another path: the samples judged by another clip's. Intervals: 95 %, over videos."
    " Coverage: the share that could be measured."
)
NAMES = {
    "psnr": "PSNR to the decoded truth",
    "ssim": "SSIM to the decoded truth",
    "rot_err_deg": "rotation error",
    "trans_err_m": "translation error",
    "cam_mc": "camera matrix error",
    "trajectory": "trajectories followed",
    "trajectory_mean": "direction, unsigned cosine",
    "trajectory_signed": "direction, signed cosine",
    "revisit_psnr": "PSNR at revisits",
    "revisit_ssim": "SSIM at revisits",
    "drift": "loss of quality",
    "symmetry": "memory symmetry",
    "turns_followed": "turns with the mouse",
}
ALIGNED = {"_rotations": ", rotations aligned", "_umeyama": ", Umeyama aligned"}
KINDS = (
    ("sample", "samples", "bold"),
    ("floor", "floor", "dashed"),
    ("ceiling", "ceiling", "dashed"),
)


def judged_view(judged: Judged, folder: Path) -> dict[str, Any]:
    """Return the evaluation's part of a stage's section."""
    shown = [measure for measure in judged.measures if measure.value is not None]
    columns = shown[:MOST_COLUMNS]
    about = [f"Checkpoint of step {judged.step:,}." if judged.step is not None else ""]
    about += [f"{len(judged.clips)} held-out clips." if judged.clips else ""]
    about += [f"Poses of the samples by {judged.poses}." if judged.poses else ""]
    about += [f"Before: step {judged.before:,}." if judged.before is not None else ""]
    place = (folder / "evaluation").absolute()
    left = len(judged.samples) - MOST_PICTURES
    return {
        "words": " ".join(part for part in (*about, LEGEND) if part),
        "problem": judged.problem,
        "rows": [row_of(measure) for measure in shown],
        "other": any(measure.other is not None for measure in shown),
        "before": any(measure.before is not None for measure in shown),
        "missing": [
            {"label": label_of(measure.name), "reason": measure.reason}
            for measure in judged.measures
            if measure.value is None
        ],
        "charts": [chart for measure in shown if (chart := by_second(measure))],
        "samples": [embed(path) for path in judged.samples[:MOST_PICTURES]],
        "samples_left": f"{left} more are in {place}." if left > 0 else "",
        "paths": [embed(path) for path in judged.paths[:MOST_PICTURES]],
        "columns": [with_unit(measure) for measure in columns],
        "clips": [
            {"name": key, "cells": [cell_of(row.get(measure.name)) for measure in columns]}
            for key, row in judged.clips.items()
            if columns
        ],
        "clips_words": "Below each figure the clip's own floor and ceiling."
        + (f" The other measures are in {place}." if len(shown) > len(columns) else ""),
    }


def label_of(name: str) -> str:
    """Return a measure's name in words."""
    for end, words in ALIGNED.items():
        if name.endswith(end):
            return label_of(name.removesuffix(end)) + words
    return NAMES.get(name, name.replace("_", " "))


def with_unit(measure: Measure) -> str:
    label = label_of(measure.name)
    return f"{label}, {measure.unit}" if measure.unit else label


def row_of(measure: Measure) -> dict[str, Any]:
    """Return one line of the table."""
    low, high = measure.interval or (None, None)
    share, count = measure.own_better, measure.own_better_n
    return {
        "label": label_of(measure.name),
        "unit": measure.unit,
        "arrow": "↑" if measure.more else "↓",
        "value": figure(measure.value, DIGITS),
        "interval": f"{figure(low, DIGITS)} – {figure(high, DIGITS)}",
        "floor": figure(measure.floor, DIGITS),
        "ceiling": figure(measure.ceiling, DIGITS),
        "gain": with_error(*measure.gain),
        "other": figure(measure.other, DIGITS),
        "own_better": "" if share is None else f"own better in {share:.0%} of {count}",
        "before": figure(measure.before, DIGITS),
        "coverage": f"{measure.coverage:.0%}" if measure.coverage is not None else "–",
        "n": f"{measure.n} videos",
        "bar": bar_of(measure),
    }


def cell_of(values: tuple[float, ...] | None) -> dict[str, str]:
    """Return a clip's figure and, under it, its floor and ceiling."""
    if values is None:
        return {"value": "–", "beside": ""}
    value, floor, ceiling = (figure(value, DIGITS) for value in values)
    return {"value": value, "beside": f"{floor} – {ceiling}"}


def bar_of(measure: Measure) -> dict[str, Any] | None:
    """Return the place of a number and its interval between floor (left) and ceiling (right), in
    percent.

    None where these two are no ends of a scale: a frozen video is best at some measures, and equal
    pictures have no PSNR.
    """
    floor, ceiling = measure.floor, measure.ceiling
    if measure.value is None or measure.interval is None or floor is None or ceiling is None:
        return None
    width = ceiling - floor
    endless = measure.unit == "dB" and ceiling >= EQUAL_DB
    if endless or not width or (width > 0) != measure.more:
        return None

    def place(value: float) -> float:
        return min(max(100 * (value - floor) / width, 0.0), 100.0)

    left, right = sorted(map(place, measure.interval))
    beaten = all((end - floor) * width > 0 for end in measure.interval)
    lost = all((end - floor) * width < 0 for end in measure.interval)
    share = (measure.value - floor) / width
    return {
        "left": left,
        "width": right - left,
        "at": place(measure.value),
        "tone": "good" if beaten else "bad" if lost else "wait",
        "words": f"{share:.0%} of the way from the floor to the ceiling",
    }


def by_second(measure: Measure) -> Chart | None:
    """Return the chart of a measure over the seconds of a clip, beside its floor; None for less
    than two seconds."""
    points = {column: over_seconds(measure, column) for column, _, _ in KINDS}
    if len(points["sample"]) < 2 or not points["floor"]:
        return None
    lines = [
        Line(label, points[column], kind, colour)
        for colour, (column, label, kind) in enumerate(KINDS)
        if points[column]
    ]
    return make_chart(label_of(measure.name), lines, x_label="second", unit=measure.unit)


def over_seconds(measure: Measure, column: str) -> Points:
    values = measure.by_second.get(column, [])
    return [(place + 1.0, value) for place, value in enumerate(values) if value is not None]
