"""Compare rollouts with the least that a model must beat: the first frame, held still."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

SPANS = ("clip", "first_second")


@dataclass(frozen=True)
class Figure:
    """Store a mean over `n` clips and its standard error, which is null with one clip."""

    mean: float
    standard_error: float | None
    n: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.1f}"
        return f"{self.mean:.1f}{error}"


def figure(values: list[float]) -> Figure:
    """Return mean and standard error of one value per clip."""
    n = len(values)
    return Figure(fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None, n)


def psnr(truth: np.ndarray, video: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of uint8 pixels, over all frames together; at
    most 100."""
    error = float(np.mean((truth.astype(np.float64) - video) ** 2))
    return 10.0 * math.log10(255.0**2 / max(error, 255.0**2 * 1e-10))


def clip_psnr(truth: np.ndarray, sample: np.ndarray, fps: float) -> dict[str, float]:
    """Return PSNR to the truth of a sample and of the frozen first frame, over the clip and over
    its first second, for videos [F, H, W, 3]; the first frame, which is given, does not count."""
    frozen = np.broadcast_to(truth[:1], truth.shape)
    second = max(2, 1 + round(fps))
    return {
        f"{name}_psnr_{span}": psnr(truth[1:stop], video[1:stop])
        for name, video in (("sample", sample), ("frozen", frozen))
        for span, stop in zip(SPANS, (len(truth), second), strict=True)
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Figure]:
    """Return each figure of `clip_psnr` over all clips, and `gain_<span>`: sample above frozen."""
    gains = [
        {f"gain_{span}": row[f"sample_psnr_{span}"] - row[f"frozen_psnr_{span}"] for span in SPANS}
        for row in rows
    ]
    named = [row | gain for row, gain in zip(rows, gains, strict=True)]
    return {name: figure([row[name] for row in named]) for name in named[0]}


def verdict(figures: dict[str, Figure]) -> str:
    """Return the comparison as a person reads it."""
    clip, second = (
        f"{figures[f'sample_psnr_{span}']} dB, frozen first frame {figures[f'frozen_psnr_{span}']}"
        for span in SPANS
    )
    n = figures["gain_clip"].n
    lost = figures["gain_clip"].mean < 0
    return (
        f"PSNR to the truth over {n} held-out clip{'s' * (n > 1)}: {clip}; over the first second"
        f" {second}" + ("; samples lose to the frozen first frame" if lost else "")
    )
