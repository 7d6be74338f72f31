"""Measure if a video lasts: how it fades from its first seconds to its last, and if it looks the
same on the way back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.pictures import mean_squared_error
from wm_train.evaluation.metrics.score import Score, unknown

WINDOW_S = 10.0  # SANA-WM D.3
DECAY, OFFSET, POWER, EDGE = 1e-4, 1000.0, 1.1, 0.1  # WorldScape A.1.1


def windows(values: NDArray[np.float64], fps: float, window_s: float = WINDOW_S) -> list[float]:
    """Return the means of values [F] over whole windows; a shorter tail is left out."""
    length = round(window_s * fps)
    count = len(values) // length if length else 0
    return [float(np.mean(values[i * length : (i + 1) * length])) for i in range(count)]


def drift(values: NDArray[np.float64], fps: float, window_s: float = WINDOW_S) -> Score:
    """Return the mean of the first window of [F] minus that of the last (Delta IQ of D.3, for
    100 x imaging quality)."""
    means = windows(values, fps, window_s)
    if len(means) < 2:
        spent = f"the video has {len(means)} whole windows of {window_s:g} s"
        return unknown(f"{spent}, expected at least 2")
    used = len(means) * round(window_s * fps)
    return Score(means[0] - means[-1], len(means), used / len(values))


def memory_symmetry(video: NDArray[np.uint8]) -> Score:
    """Return how alike frames i and F-1-i are, 1 for equal ones, on a path that goes there and back
    the same way (WorldScape A.1.1).

    Each pair scores exp(-1e-4 max(MSE - 1000, 0)^1.1), MSE on 0..255, with the weight
    exp(0.1 |i - (F-1)/2|): the outermost pairs count most. An MSE of 1000, 18.1 dB, is still a
    perfect score.
    """
    pairs = len(video) // 2
    if not pairs:
        return unknown(f"the video has {len(video)} frames, expected at least 2")
    errors = np.array([mean_squared_error(video[i], video[-1 - i]) for i in range(pairs)])
    scores = np.exp(-DECAY * np.maximum(errors - OFFSET, 0) ** POWER)
    weights = np.exp(EDGE * np.abs(np.arange(pairs) - (len(video) - 1) / 2))
    return Score(float((weights * scores).sum() / weights.sum()), pairs, 1.0)
