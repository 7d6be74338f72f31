"""Compare two score networks on a student's clips: the gradient of distribution matching
(DMD, Yin et al. 2024; SANA-WM §3.1, MoWorld eq. 14-18, Waypoint eq. 9, WorldScape §2.3).

A network is any function (noisy [B, t, C, h, w], level [B, t]) -> velocity [B, t, C, h, w], with
its conditions and sequence bound. On one noisy clip x_sigma = a x + sigma eps, a = 1 - sigma, the
clean predictions x0 = x_sigma - sigma v of a teacher (real) and a critic (fake) differ by
sigma (v_real - v_fake). The papers weigh that gap in three ways. Everything is computed in fp32, or
in the network's type where that is wider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
# (value [B, t], weight [B, t]) -> [B], over whole clips: `mean` of a `SequenceShard`
ClipMean = Callable[[Tensor, Tensor], Tensor]
SMALLEST_NORMALISER = 1e-6


@dataclass(frozen=True)
class ScoreDifference:
    """Hold the gradient of distribution matching at a student's clean latents.

    g: [B, t, C, h, w], zero at frames without a loss; gap: size of v_real - v_fake over that of
    v_real, [B], equal on all processes that share a clip.
    """

    g: Tensor
    gap: Tensor


def spread(level: Tensor) -> Tensor:
    """Return one number per frame, [B, t], as [B, t, 1, 1, 1] beside latents."""
    return level[:, :, None, None, None]


def widened(x: Tensor) -> Tensor:
    """Return x in fp32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noised(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Return (1 - sigma) clean + sigma noise, [B, t, C, h, w], at the levels [B, t]."""
    sigma = spread(level)
    return (1 - sigma) * clean + sigma * noise


@torch.no_grad()
def score_difference(
    clean: Tensor,
    noise: Tensor,
    level: Tensor,
    real: Velocity,
    fake: Velocity,
    mean: ClipMean,
    *,
    weight: str = "normalised",
    scored: Tensor | None = None,
    scopes: Tensor | None = None,
) -> ScoreDifference:
    """Return the gradient g of the matching loss sum(g * clean) at the student's clean latents.

    clean, noise: [B, t, C, h, w]; level: [B, t], 0 at given frames; scored: [B, t], 1 at frames
    with a loss; None: all that are not given.
    weight: of x0_fake - x0_real,
      normalised  1 / mean |clean - x0_real|, the mean over a scope and its frames with a loss
      velocity    1 / sigma
      score       a / sigma^2, times a, the derivative of x_sigma
    scopes: bool [K, t], the local frames of each of K scopes, K equal on all shards; None: the clip
    is one scope.
    """
    noisy, sigma = noised(clean, noise, level), spread(level)
    v_real, v_fake = widened(real(noisy, level)), widened(fake(noisy, level))
    scored, difference = scored_frames(level, scored), v_real - v_fake
    if weight == "normalised":
        distance = (clean - (noisy - sigma * v_real)).abs().mean(dim=(2, 3, 4))  # [B, t]
        normaliser = scope_means(distance, scored, mean, scopes).clamp(SMALLEST_NORMALISER)
        g = sigma * difference / spread(normaliser)  # x0_fake - x0_real = sigma (v_real - v_fake)
    elif weight == "velocity":
        g = difference
    else:
        assert weight == "score", weight
        g = torch.where(sigma > 0, (1 - sigma).square() / sigma, 0.0) * difference
    sizes = (x.square().mean(dim=(2, 3, 4)) for x in (difference, v_real))
    over, under = (mean(size, scored) for size in sizes)
    return ScoreDifference(g * spread(scored), (over / under.clamp(1e-30)).sqrt())


def scope_means(value: Tensor, weight: Tensor, mean: ClipMean, scopes: Tensor | None) -> Tensor:
    """Return at each frame the weighted mean of value [B, t] over its scope, [B, t]; one exchange.
    A scope without weight has the mean 0."""
    b, t = value.shape
    if scopes is None:
        return mean(value, weight)[:, None].expand(b, t)
    k = len(scopes)
    values, parts = value[:, None].expand(b, k, t), weight[:, None] * scopes.to(weight.dtype)
    means = mean(values.reshape(b * k, t), parts.reshape(b * k, t)).reshape(b, k)
    return means @ scopes.to(means.dtype)


def critic_errors(critic: Velocity, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Return the flow-matching error of a critic on a student's clips, [B, t]: the mean of
    (v - (noise - clean))^2 over a frame. `clean` takes no gradient; arguments as for
    `score_difference`."""
    clean = clean.detach()
    velocity = widened(critic(noised(clean, noise, level), level))
    return (velocity - (noise - clean)).square().mean(dim=(2, 3, 4))


def critic_loss(
    critic: Velocity, clean: Tensor, noise: Tensor, level: Tensor, mean: ClipMean
) -> Tensor:
    """Return the mean of `critic_errors` over the frames that are not given, [B]."""
    return mean(critic_errors(critic, clean, noise, level), scored_frames(level, None))


def scored_frames(level: Tensor, scored: Tensor | None) -> Tensor:
    """Return 1 at frames with a loss and 0 elsewhere, [B, t]: those that are not given, of `scored`
    if it is there."""
    free = (level > 0).to(level.dtype)
    return free if scored is None else free * scored
