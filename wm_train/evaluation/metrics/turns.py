"""Judge whether the picture turns with the mouse: the sign of the horizontal shift of successive
frames against the sign of the mouse motion that asked for it (Waypoint-1.5's demo).

When a camera turns to the right, what it sees moves to the left. No network is needed: two
successive frames differ by little, so the shift is the one at which they fit best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.time_layout import TimeLayout
from wm_train.evaluation.metrics.score import Score, unknown

REACH = 1 / 16  # of the width: the largest shift of two successive frames that is looked for
BAND = (0.2, 0.6)  # of the height, around the horizon: a floor tells little of turns
MOST = 20.0  # grey levels: two pixels that differ by more are not of the same thing
# in units of the mouse's spread over the data set: less is no turn. On training clips of the demo
# 99.8 % of such turns are seen in the decoded truth, at 1.0 97.9 %, as walking past near walls
# moves the picture as well
LEAST_MOTION = 1.5
LEAST_SHIFT = 0.5  # pixels: less is undecided
LUMA = np.array([0.299, 0.587, 0.114])


def mouse_column(names: Sequence[str]) -> int | None:
    """Return the place of the mouse's motion to the right among the controls, None without: the
    first that is named after the mouse, as mouse_dx."""
    return next((place for place, name in enumerate(names) if name.startswith("mouse")), None)


def shift_costs(video: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return [2 R + 1, F - 1], how badly each frame of [F, H, W, 3] fits the one after it where
    what it shows moves to the right by -R to R pixels: the mean difference of the band around the
    horizon where the two overlap.

    Differences count up to `MOST` each: what comes into view from behind another thing differs
    however far it moved.
    """
    low, high = (round(share * video.shape[1]) for share in BAND)
    grey = video[:, low:high].astype(np.float64) @ LUMA
    width = grey.shape[2]
    reach = max(1, round(width * REACH))
    first, second = grey[:-1], grey[1:]
    costs = np.empty((2 * reach + 1, len(first)))
    for place, shift in enumerate(range(-reach, reach + 1)):
        left, right = max(0, shift), width + min(0, shift)
        moved = second[:, :, left:right] - first[:, :, left - shift : right - shift]
        costs[place] = np.minimum(np.abs(moved), MOST).mean(axis=(1, 2))
    return costs


def best_shifts(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [n], the shifts of least cost of [2 R + 1, n]; a parabola through the least and its
    neighbours gives fractions, and 0 is of costs that are all the same."""
    reach = len(costs) // 2
    best = np.clip(costs.argmin(axis=0), 1, 2 * reach - 1)
    pair = np.arange(costs.shape[1])
    before, at, after = (costs[best + step, pair] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    fraction = np.where(bend > 0, 0.5 * (before - after) / np.where(bend > 0, bend, 1.0), 0.0)
    found: NDArray[np.float64] = best - reach + np.clip(fraction, -1.0, 1.0)
    return np.where(costs.max(axis=0) > costs.min(axis=0), found, 0.0)


def turns_followed(video: NDArray[np.uint8], mouse: NDArray[Any], time: TimeLayout) -> Score:
    """Return the share of turns in which the picture moves against the mouse; undecided ones count
    as wrong.

    video: [F, H, W, 3]. mouse: [T], motion to the right up to each latent frame, in units of the
    data set's spread; a latent frame but the first with at least `LEAST_MOTION` is a turn. Its
    shift is that from the last raw frame of the latent before to its own last one, in equal steps:
    one that fits all of them is found more surely than each alone.
    """
    costs = shift_costs(video)
    edges = [time.start(t + 1) - 1 for t in range(len(mouse))]  # the last raw frame of each latent
    turns = [t for t in range(1, len(mouse)) if abs(mouse[t]) >= LEAST_MOTION]
    if not turns:
        return unknown("the mouse does not turn")
    steps = [costs[:, edges[t - 1] : edges[t]] for t in turns]
    shift = best_shifts(np.stack([each.mean(axis=1) for each in steps], axis=1))
    moved = shift * np.array([each.shape[1] for each in steps])
    right = (np.sign(moved) == -np.sign(mouse[turns])) & (np.abs(moved) >= LEAST_SHIFT)
    return Score(float(right.mean()), len(turns), 1.0)
