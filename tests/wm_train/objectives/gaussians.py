"""Closed forms of rectified flow on Gaussian data N(mu, S): the oracles of distribution matching.

With a = 1 - sigma and L = a^2 S + sigma^2 I the best velocity is
-mu + (sigma I - a S) L^-1 (x - a mu), its clean prediction mu + a S L^-1 (x - a mu). Latents are
[B, 1, C, 1, 1]: one frame of C numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence

MEAN = LocalSequence(ClipLayout(1)).mean


def velocity_of(mean: Tensor, covariance: Tensor):
    """Return the best velocity network of N(mean [C], covariance [C, C])."""

    def velocity(noisy: Tensor, level: Tensor) -> Tensor:
        sigma, eye = level[..., None, None], torch.eye(len(mean), dtype=mean.dtype)
        a = 1 - sigma
        lam = a**2 * covariance + sigma**2 * eye
        centred = noisy.flatten(2)[..., None] - a * mean[:, None]
        flow = (sigma * eye - a * covariance) @ torch.linalg.solve(lam, centred)
        return (flow - mean[:, None]).reshape(noisy.shape)

    return velocity


def cubature(dims: int) -> tuple[Tensor, Tensor]:
    """Return points z and noise, [4 C, C] each, jointly of mean 0 and covariance I: means of
    quadratic functions over them are exact."""
    points = torch.cat([torch.eye(2 * dims), -torch.eye(2 * dims)]).double() * (2 * dims) ** 0.5
    return points[:, :dims], points[:, dims:]


def latents(rows: Tensor) -> Tensor:
    """Return rows [B, C] as latents [B, 1, C, 1, 1]."""
    return rows[:, None, :, None, None]


def at(sigma: float, rows: Tensor) -> Tensor:
    """Return the level sigma of every row, [B, 1]."""
    return torch.full((len(rows), 1), sigma, dtype=rows.dtype)


def covariance_of(dims: int, seed: int) -> Tensor:
    """Return a covariance with eigenvalues from 0.3 to 2, fp64."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.linspace(0.3, 2.0, dims, dtype=torch.float64)) @ q.T


def step(b: Tensor, matrix: Tensor, sigma: float, real, fake, difference, lr: float) -> None:
    """Take one gradient step of the student A z + b, in place, exact over z and noise.

    difference: `score_difference` with its weight bound.
    """
    z, noise = cubature(len(b))
    clean = z @ matrix.T + b
    g = difference(latents(clean), latents(noise), at(sigma, clean), real, fake, MEAN).g
    g = g.flatten(1)
    b -= lr * g.mean(0)
    matrix -= lr * g.T @ z / len(z)
