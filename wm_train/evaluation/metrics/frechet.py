"""Measure the distance between two sets of features (FVD with I3D's features)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.score import Score, unknown

LEAST = 256  # videos: below it the value says more about the number of videos than about them


def frechet(a: NDArray[np.float64], b: NDArray[np.float64], least: int = LEAST) -> Score:
    """Return the Fréchet distance of features [N, D] and [M, D], taken as Gaussians:
    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Raises ValueError for unlike widths."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features: got {a.shape} and {b.shape}, expected [N, D] and [M, D]")
    count = min(len(a), len(b))
    if count < max(2, least):
        return unknown(f"{count} videos, expected at least {max(2, least)}")
    parts = ((x.mean(axis=0), np.cov(x.astype(np.float64).T, ddof=1)) for x in (a, b))
    return Score(gaussian_distance(*next(parts), *next(parts)), count, 1.0)


def gaussian_distance(
    mean_a: NDArray[np.float64],
    cov_a: NDArray[np.float64],
    mean_b: NDArray[np.float64],
    cov_b: NDArray[np.float64],
) -> float:
    """Return the distance of two Gaussians, means [D] and covariances [D, D].

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
    symmetric, so no complex root appears.
    """
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)
