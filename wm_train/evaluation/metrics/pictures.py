"""Compare pictures, [H, W, 3] uint8, and videos of them, [F, H, W, 3]."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

PEAK = 255.0
MOST_DB = 100.0  # of pictures whose mean squared error is below 1e-10 (eval_unified.py)
WINDOW = 11  # pixels, of SSIM's uniform window
K1, K2 = 0.01, 0.03
Picture = NDArray[np.uint8]
Compare = Callable[[Picture, Picture], float]


def mean_squared_error(a: Picture, b: Picture) -> float:
    """Return the mean squared difference, in (0..255)^2. Raises ValueError for unlike shapes."""
    if a.shape != b.shape:
        raise ValueError(f"pictures: got {b.shape}, expected the same size as {a.shape}")
    return float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def psnr(a: Picture, b: Picture) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 100."""
    error = mean_squared_error(a, b)
    return MOST_DB if error < 1e-10 else float(10 * np.log10(PEAK**2 / error))


def ssim(a: Picture, b: Picture) -> float:
    """Return the structural similarity: mean over channels and all 11x11 windows inside the
    picture, uniform weights (Wang et al. 2004, eq. 13). Raises ValueError for smaller pictures."""
    if min(a.shape[:2]) < WINDOW or a.shape != b.shape:
        raise ValueError(
            f"pictures: got {a.shape} and {b.shape}, expected one size of at least {WINDOW} pixels"
        )
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = window_means(x), window_means(y)
    var_x, var_y = window_means(x * x) - mean_x**2, window_means(y * y) - mean_y**2
    both = window_means(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def window_means(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each 11x11 window of [H, W, 3] -> [H-10, W-10, 3]."""
    for axis in (0, 1):
        sums = np.cumsum(x, axis=axis)
        sums = np.insert(sums, 0, 0.0, axis=axis)
        end = np.take(sums, range(WINDOW, sums.shape[axis]), axis=axis)
        x = (end - np.take(sums, range(sums.shape[axis] - WINDOW), axis=axis)) / WINDOW
    return x


def by_frame(a: NDArray[np.uint8], b: NDArray[np.uint8], compare: Compare) -> NDArray[np.float64]:
    """Return [F]: `compare` of each frame of two videos. Raises ValueError for unlike shapes."""
    if a.shape != b.shape:
        raise ValueError(f"videos: got {b.shape}, expected {a.shape}")
    return np.array([compare(x, y) for x, y in zip(a, b)], np.float64)


def by_second(values: NDArray[np.float64], fps: float, first: int = 1) -> list[float | None]:
    """Return the mean of [F] values over each second of the video; a last one that is not whole is
    one too. Frames before `first` are given to the model and not counted. None: nothing known."""
    seconds = np.floor(np.arange(len(values)) / fps).astype(int)
    counted = np.isfinite(values) & (np.arange(len(values)) >= first)
    means: list[float | None] = []
    for second in range(int(seconds[-1]) + 1 if len(values) else 0):
        own = values[counted & (seconds == second)]
        means.append(float(own.mean()) if len(own) else None)
    return means


def temporal_flickering(video: NDArray[np.uint8]) -> float:
    """Return 1 minus the mean difference of neighbouring frames over 255 (VBench TF, which needs no
    weights); 1 is a still picture."""
    steps = [np.abs(np.subtract(y, x, dtype=np.float64)).mean() for x, y in pairwise(video)]
    return float(1 - np.mean(steps) / PEAK) if steps else 1.0
