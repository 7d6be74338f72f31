"""Draw what tells that a distillation goes wrong, from a stage's record of its turns.

Losses do not show it: a normalised gradient keeps its size. A critic that lags (its loss over the
teacher's on data rises), a gradient that turns (the cosine of successive ones), rollouts that burn,
stop moving, drift or all look alike do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wm_train.config.roles import CRITIC, STUDENT
from wm_train.evaluation.pictures import write_png
from wm_train.evaluation.plots import INK, Picture, panel
from wm_train.evaluation.rollout_statistics import TURN_OVER_FLOOR
from wm_train.objectives.score_levels import MIDDLES, SHARE_AT
from wm_train.tracking.mlflow_record import METRICS
from wm_train.tracking.tracker import Tracker, read_steps

WIDTH, HEIGHT, TOP = 980, 220, 24
INKS = ((40, 110, 200), (220, 90, 30), (50, 150, 80), (150, 80, 170), (120, 120, 120))
SMOOTH = 12  # turns of a running mean
Row = Mapping[str, float]
# title, and the figures of one panel
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "critic loss over its floor",
        tuple(f"{CRITIC}/{TURN_OVER_FLOOR}{middle}" for middle in MIDDLES),
    ),
    ("student", (f"{STUDENT}/direction_cosine", f"{STUDENT}/clamped", f"{STUDENT}/gap")),
    ("rollouts over data", tuple(f"rollout/{x}_ratio" for x in ("std", "motion"))),
    ("rollouts", tuple(f"rollout/{x}" for x in ("drift", "diversity", "mean_shift"))),
    ("clipped luma", ("rollout/clipped_luma", "rollout/clipped_luma_data")),
    ("distance of the average", ("rollout/average_distance",)),
)


def show_turns(folder: Path, step: int, tracker: Tracker) -> None:
    """Write the picture of the turns up to this step, `turns/step_<n>.png` in the stage's
    folder."""
    target = folder / "turns" / f"step_{step:08d}.png"
    target.parent.mkdir(exist_ok=True)
    write_png(target, turns_picture(read_steps(folder / METRICS)))
    tracker.artifact(target)


def turns_picture(rows: Sequence[Row]) -> Picture:
    """Return the figures over the steps, with a histogram of the noise levels that scores were
    compared at; figures of turns are running means over 12 turns of their role."""
    from PIL import Image, ImageDraw

    lines = (len(PANELS) + 2) // 2
    sheet = Image.new("RGB", (WIDTH, lines * (HEIGHT + TOP)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    half = WIDTH // 2
    for number, (title, names) in enumerate([*PANELS, ("share of noise levels", ())]):
        left, top = number % 2 * half, number // 2 * (HEIGHT + TOP)
        if names:
            curves = [(_curve(rows, name), ink) for name, ink in zip(names, INKS, strict=False)]
            _legend(draw, (left + 44, top + 6), [name.split("/")[1] for name in names])
        else:
            curves = [(_histogram(rows), INKS[0])]
        box = (left, top + TOP, left + half, top + TOP + HEIGHT)
        shown = [curve for curve in curves if len(curve[0])]
        empty = [(np.full((1, 2), np.nan), INK)]
        panel(draw, box, shown or empty, (title, ""), zero=not names)
    return np.asarray(sheet)


def _curve(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """Return [n, 2], steps and values; of turns their running mean."""
    known = np.array([(row["step"], row[name]) for row in rows if name in row], np.float64)
    if not len(known):
        return np.empty((0, 2))
    if not name.startswith("rollout/"):
        sums = np.cumsum(np.concatenate([[0.0], known[:, 1]]))
        ends = np.arange(1, len(known) + 1)
        starts = np.maximum(ends - SMOOTH, 0)
        known[:, 1] = (sums[ends] - sums[starts]) / (ends - starts)
    return known


def _histogram(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Return the outline of a bar for each fifth of the noise levels, [n, 2], over all turns."""
    names = [f"{SHARE_AT}{middle}" for middle in MIDDLES]
    counted = [[row[name] for name in names] for row in rows if names[0] in row]
    if not counted:
        return np.empty((0, 2))
    shares, width = np.mean(counted, axis=0), 0.5 / len(MIDDLES)
    points = [(0.0, 0.0)]
    for middle, share in zip(MIDDLES, shares, strict=True):
        points += [(middle - width, share), (middle + width, share)]
    return np.array([*points, (1.0, 0.0)])


def _legend(draw: object, place: tuple[int, int], names: Sequence[str]) -> None:
    """Write names in the colours of their lines, without what they share."""
    x, y = place
    for name, ink in zip(names, INKS, strict=False):
        text = name.replace("_ratio", "").replace(TURN_OVER_FLOOR, "sigma ").replace("_", " ")
        draw.text((x, y), text, fill=ink)  # type: ignore[attr-defined]
        x += 9 + 6 * len(text)
