"""Compare the steps of two camera paths (Trajectory Accuracy, WorldScape A.1.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.score import Score, mean_score

STILL = 1e-6  # metres or radians: a step below it is none
PASSES = 0.55


@dataclass(frozen=True)
class TrajectoryAccuracy:
    """Hold the three readings of one video.

    passed: 1 if the mean of (|cos t| + |cos r|) / 2 over the steps reaches 0.55, else 0, as the
    paper reports; mean: that mean; signed: without the absolute values, so that a path walked
    backwards is -1 and not 1.
    """

    passed: Score
    mean: Score
    signed: Score


def trajectory_accuracy(
    truth: NDArray[np.float64], estimate: NDArray[np.float64]
) -> TrajectoryAccuracy:
    """Compare steps of paths [F, 4, 4]; a step next to an unknown pose (NaN) is unknown.

    The paper's "Euler angles of the difference of rotations" has no meaning, as that difference is
    no rotation: ours are those of R_t^T R_{t+1}. Where both stand still the cosine is 1, where one
    does it is 0.
    """
    moves, turns = (
        cosines(of(truth), of(estimate)) for of in (steps_of_centres, steps_of_rotation)
    )
    signed = (moves + turns) / 2
    mean = mean_score((np.abs(moves) + np.abs(turns)) / 2, "steps")
    passed = None if mean.value is None else float(mean.value >= PASSES)
    return TrajectoryAccuracy(
        Score(passed, mean.n, mean.coverage, mean.reason), mean, mean_score(signed, "steps")
    )


def steps_of_centres(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [F-1, 3]: how the camera's centre moves, in the axes of the first known camera."""
    known = np.flatnonzero(np.isfinite(poses).all(axis=(1, 2)))
    first = poses[known[0], :3, :3] if len(known) else np.eye(3)
    return np.asarray(np.diff(poses[:, :3, 3], axis=0) @ first)


def steps_of_rotation(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [F-1, 3]: Euler angles about fixed x, y, z of each step's rotation, in radians."""
    step = np.einsum("fji,fjk->fik", poses[:-1, :3, :3], poses[1:, :3, :3])
    return np.stack(
        [
            np.arctan2(step[:, 2, 1], step[:, 2, 2]),
            -np.arcsin(np.clip(step[:, 2, 0], -1, 1)),
            np.arctan2(step[:, 1, 0], step[:, 0, 0]),
        ],
        axis=1,
    )


def cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of the angle between rows of [n, 3] each; NaN where a row is unknown."""
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    both_still, one_still = (
        (size_a < STILL) & (size_b < STILL),
        (size_a < STILL) ^ (size_b < STILL),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a * b).sum(axis=1) / (size_a * size_b)
    result = np.where(both_still, 1.0, np.where(one_still, 0.0, cosine))
    return np.where(np.isfinite(size_a) & np.isfinite(size_b), result, np.nan)
