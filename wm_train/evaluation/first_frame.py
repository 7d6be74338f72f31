"""Compare rollouts with the least that a model must beat: the first frame, held still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wm_train.evaluation.metrics.pictures import by_frame, psnr
from wm_train.evaluation.metrics.score import Score, Summary, summarise

SPANS = ("clip", "first_second")


def over_clips(values: Sequence[float]) -> Summary:
    """Return mean, standard error and interval of one value per clip."""
    return summarise([Score(value, 1, 1.0) for value in values])


def in_words(summary: Summary) -> str:
    """Return mean and standard error as a person reads them; one clip has no error."""
    error = summary.standard_error
    return f"{summary.mean:.1f}" + ("" if error is None else f" +- {error:.1f}")


def clip_psnr(
    truth: np.ndarray, sample: np.ndarray, fps: float, given: int = 1
) -> dict[str, float]:
    """Return PSNR to the truth of a sample and of the frozen first frame, the mean over the frames
    of the clip and over those of its first second, for videos [F, H, W, 3]; the `given` first
    frames, those of the first latent, do not count."""
    frozen = np.broadcast_to(truth[:1], truth.shape)
    second = given + max(1, round(fps))
    frames = {"sample": by_frame(truth, sample, psnr), "frozen": by_frame(truth, frozen, psnr)}
    return {
        f"{name}_psnr_{span}": float(values[given:stop].mean())
        for name, values in frames.items()
        for span, stop in zip(SPANS, (len(truth), second), strict=True)
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Summary]:
    """Return each figure of `clip_psnr` over all clips, and `gain_<span>`: sample above frozen."""
    gains = [
        {f"gain_{span}": row[f"sample_psnr_{span}"] - row[f"frozen_psnr_{span}"] for span in SPANS}
        for row in rows
    ]
    named = [row | gain for row, gain in zip(rows, gains, strict=True)]
    return {name: over_clips([row[name] for row in named]) for name in named[0]}


def verdict(figures: dict[str, Summary]) -> str:
    """Return the comparison as a person reads it."""
    clip, second = (
        f"{in_words(figures[f'sample_psnr_{span}'])} dB, frozen first frame"
        f" {in_words(figures[f'frozen_psnr_{span}'])}"
        for span in SPANS
    )
    gain = figures["gain_clip"]
    lost = gain.mean is not None and gain.mean < 0
    return (
        f"PSNR to the truth over {gain.n} held-out clip{'s' * (gain.n > 1)}: {clip}; over the first"
        f" second {second}" + ("; samples lose to the frozen first frame" if lost else "")
    )
