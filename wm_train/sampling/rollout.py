"""Sample clips: first latent frame and camera path -> latents, by Euler steps of the learned flow.

`rollout` denoises the whole clip at once, `stream.stream_rollout` chunk by chunk, as chunk-causal
models are deployed. Both take the same noise, levels, guidance and experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout, FrameRange
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.experts import Experts, experts_of
from wm_train.sampling.guidance import UNGUIDED, Guidance, guidance_views, guided, velocities
from wm_train.sampling.levels import first_frames


@torch.no_grad()
def rollout(
    model: nn.Module | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    sequence: SequenceShard,
    *,
    guidance: Guidance = UNGUIDED,
) -> Tensor:
    """Return the local frames of sampled clips, fp32 [B, t, C, h, w], all denoised together.

    model: one for all noise levels, or experts; first_latent: [B, C, h, w], normalised, stays clean
    at the clip's first frame; levels: of `sampling_levels`; draws: int64 [B], which key the noise;
    guidance: condition -> weight, today of the camera (1: plain; above 1 the prediction without a
    camera is pushed away from, at twice the cost).
    """
    experts, views = experts_of(model), guidance_views(conditions, guidance, draws)
    shards = [sequence] * len(views)

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        return guided(velocities(experts.at(sigma), latents, level, views, shards), guidance)

    start = start_of(sequence.layout, sequence.frames, first_latent, key, draws)
    return euler(velocity, *start, levels)


def start_of(
    layout: ClipLayout, frames: FrameRange, first_latent: Tensor, key: NoiseKey, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the start of these frames of a clip: noise [B, t, C, h, w], a mask of given frames [B,
    t], and their values [B, t, C, h, w]."""
    b, *shape = first_latent.shape
    noise = normal(key, "rollout", draws, (frames.start, frames.stop), tuple(shape))
    clean = first_frames(layout, frames, first_latent.device)[None].expand(b, len(frames))
    return noise, clean, first_latent.float()[:, None].expand(b, len(frames), *shape)


def euler(
    velocity: Callable[[Tensor, Tensor, float], Tensor],
    noise: Tensor,
    clean: Tensor,
    given: Tensor,
    levels: Sequence[float],
) -> Tensor:
    """Return data at sigma 0, by Euler steps from noise [B, t, C, h, w] at sigma 1; frames marked
    in clean [B, t] stay `given`.

    velocity(latents, level [B, t], sigma) -> [B, t, C, h, w], called once per step. `level` is 0
    at given frames; `sigma` is the step's, also on a rank with given frames only, so that all ranks
    pick the same expert.
    """
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, noise)
    for sigma, following in pairwise(levels):
        step = (following - sigma) * velocity(latents, torch.where(clean, 0.0, sigma), sigma)
        latents = torch.where(hold, given, latents + step)
    return latents
