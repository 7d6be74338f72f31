"""Diffusion forcing: every latent frame has a noise level of its own (Chen et al. 2024)."""

from __future__ import annotations

import torch
from lab.config import ForcingConfig

from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, ObjectiveOutput


def forcing(model: WorldModel, clips: Clips, config: ForcingConfig) -> ObjectiveOutput:
    """Return the mean squared error of the velocity, per clip."""
    sigma = config.lowest + (1 - config.lowest) * clips.uniform("sigma", per="frame")  # [B, t]
    level, noise = sigma[:, :, None, None, None], clips.normal("noise")
    noisy = (1 - level) * clips.latents + level * noise
    velocity = model(noisy, sigma, clips.conditions, clips.sequence).float()
    error = (velocity - (noise - clips.latents)).square().mean((2, 3, 4))
    every = torch.ones_like(error)
    mean_level = clips.sequence.mean(sigma, every)
    return ObjectiveOutput(clips.sequence.mean(error, every), {"level": mean_level})
