"""The midpoint rule for whole clips, without guidance."""

from __future__ import annotations

from itertools import pairwise

import torch
from lab.config import MidpointConfig
from torch import Tensor

from wm_train.sampling.rollout import start_of
from wm_train.sampling.sample import SampleStart


def midpoint(start: SampleStart, config: MidpointConfig) -> Tensor:
    """Return the local frames of clips, fp32 [B, t, C, h, w]."""
    sequence = start.sequence
    begin = (sequence.layout, sequence.frames, start.first_latent, start.key, start.draws)
    noise, clean, given = start_of(*begin)
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, noise)

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        level = torch.where(clean, 0.0, sigma)
        return start.experts.at(sigma)(latents, level, start.conditions, sequence).float()

    for sigma, following in pairwise(start.levels):
        half = (following - sigma) / 2
        middle = torch.where(hold, given, latents + half * velocity(latents, sigma))
        latents = latents + 2 * half * velocity(middle, sigma + half)
        latents = torch.where(hold, given, latents)
    return latents
