"""Sampling a clip: first latent frame and camera path -> latents, by Euler steps of the learned flow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.flow_matching import first_frames, shift_sigma


@torch.no_grad()
def rollout(
    model: nn.Module,
    first_latent: Tensor,
    conditions: Conditions,
    steps: int,
    key: NoiseKey,
    draws: Tensor,
    sequence: SequenceShard,
    *,
    flow_shift: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Local frames of a sampled batch of clips, fp32 [B, t, C, h, w].

    first_latent: [B, C, h, w], normalised, held clean at the first frame of the clip; draws: int64 [B], which noise each clip starts
    from; flow_shift: spacing of the steps, as in training; guidance: weight of the camera (1: plain; above 1 the prediction without
    a camera is pushed away from, at twice the cost). Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"rollout failed: got {steps} steps, expected at least 1 (key trainer.sample_steps). Fix: trainer.sample_steps=20")
    local = (sequence.frames.start, sequence.frames.stop)
    b = first_latent.shape[0]
    clean = first_frames(sequence, first_latent.device)[None, :].expand(b, local[1] - local[0])
    sigmas = shift_sigma(torch.linspace(1.0, 0.0, steps + 1), flow_shift).tolist()
    given = first_latent.float()[:, None].expand(b, local[1] - local[0], *first_latent.shape[1:])
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, normal(key, "rollout", draws, local, tuple(first_latent.shape[1:])))
    without = replace(conditions, camera_keep=torch.zeros(b, dtype=torch.bool, device=first_latent.device))
    for sigma, following in pairwise(sigmas):
        level = torch.where(clean, 0.0, sigma)
        velocity = model(latents, level, conditions, sequence).float()
        if guidance != 1.0:
            plain = model(latents, level, without, sequence).float()
            velocity = plain + guidance * (velocity - plain)
        latents = torch.where(hold, given, latents + (following - sigma) * velocity)
    return latents
