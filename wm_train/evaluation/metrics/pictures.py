"""Compare pictures, [H, W, 3] uint8, and videos of them, [F, H, W, 3]."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    x, y = (torch.from_numpy(picture).double().permute(2, 0, 1).contiguous() for picture in (a, b))
    windows = window_means(torch.cat([x, y, x * x, y * y, x * y]))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = windows.chunk(5)
    both, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * both + c1) * (2 * (mean_xy - both) + c2)
    return float((likeness / ((squares + c1) * (mean_xx + mean_yy - squares + c2))).mean())


def window_means(x: Tensor) -> Tensor:
    """Return the mean of each 11x11 window of [n, H, W] -> [n, H-10, W-10]."""
    for dim in (1, 2):
        sums = x.cumsum(dim)  # torch's is four times as fast as numpy's
        count = sums.shape[dim] - WINDOW
        x = sums.narrow(dim, WINDOW - 1, count + 1).clone()
        x.narrow(dim, 1, count).sub_(sums.narrow(dim, 0, count))
    return x / WINDOW**2


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
