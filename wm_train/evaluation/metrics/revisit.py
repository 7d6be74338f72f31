"""Compare frames that were seen from nearly the same place at different times (SANA-WM D.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.cameras import angles
from wm_train.evaluation.metrics.pictures import Compare
from wm_train.evaluation.metrics.score import Score, mean_score, unknown

NEAR_M, NEAR_DEGREES = 0.5, 20.0
MOST = 5  # pairs of a scene
GAP_S = 2.0  # ours: between the two frames, which the paper leaves open
REFERENCE_FPS = 16.0


@dataclass(frozen=True)
class RevisitPair:
    """Hold two frames of one view, numbered at 16 frames per second in SANA-WM-Bench.

    quality: distance / 0.5 m + angle / 20 degrees, ours, as the paper defines none: 0 is the same
    view.
    """

    frame_a: int
    frame_b: int
    quality: float
    distance_m: float
    angle_deg: float


def revisit_pairs(
    c2w: NDArray[np.float64], fps: float, gap_s: float = GAP_S, most: int = MOST
) -> list[RevisitPair]:
    """Return the `most` closest pairs of a path [F, 4, 4], the closest first."""
    gap = max(1, round(gap_s * fps))
    found = []
    for a in range(len(c2w) - gap):
        later = c2w[a + gap :]
        distance = np.linalg.norm(later[:, :3, 3] - c2w[a, :3, 3], axis=1)
        angle = np.degrees(angles(c2w[a, :3, :3].T @ later[:, :3, :3]))
        for b in np.flatnonzero((distance < NEAR_M) & (angle < NEAR_DEGREES)):
            quality = distance[b] / NEAR_M + angle[b] / NEAR_DEGREES
            found.append(
                RevisitPair(
                    a, int(a + gap + b), float(quality), float(distance[b]), float(angle[b])
                )
            )
    return sorted(found, key=lambda pair: (pair.quality, pair.frame_a, pair.frame_b))[:most]


def remapped(index: int, fps: float, frames: int, reference: float = REFERENCE_FPS) -> int:
    """Return the frame, of a video of `frames` at `fps`, at the time of frame `index` at the
    reference rate: round(i fps / 16), at most the last."""
    return min(round(index * fps / reference), frames - 1)


def revisit(
    video: NDArray[np.uint8],
    fps: float,
    pairs: Sequence[RevisitPair],
    compare: Compare,
    reference: float = REFERENCE_FPS,
) -> tuple[Score, list[float]]:
    """Compare the two frames of each pair in a video [F, H, W, 3]; return the mean, and the value
    of each pair."""
    if not pairs:
        return unknown("the path comes back to no view that it had before"), []
    values = [
        compare(*(video[remapped(i, fps, len(video), reference)] for i in (p.frame_a, p.frame_b)))
        for p in pairs
    ]
    return mean_score(values, "pairs"), values
