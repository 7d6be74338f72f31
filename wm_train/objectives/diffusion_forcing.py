"""Train by diffusion forcing: every latent frame has a noise level of its own, and none is given
(Waypoint-1.5 §3.1, eq. 3; Chen et al. 2024).

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, sigma = shifted sigmoid of a normal, drawn
for each frame by (seed, stage, draw, latent frame). A frame learns from a past of any noisiness,
as in a rollout, where the past is nearly clean.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parallel.local_attention import accumulation_dtype
from wm_train.conditioning import Conditions
from wm_train.models.spec import WorldModel
from wm_train.noise import normal
from wm_train.objectives.clips import Clips, ObjectiveOutput
from wm_train.objectives.forcing_config import DiffusionForcingConfig
from wm_train.sampling.levels import shift_sigma


def diffusion_forcing(
    model: WorldModel, clips: Clips, config: DiffusionForcingConfig
) -> ObjectiveOutput:
    """Return the mean squared error of the velocity over all real frames, per clip. Metrics:
    sigma, the mean over the frames; controls, whether they were seen."""
    latents, sequence = clips.latents, clips.sequence
    sigma = frame_sigma(clips, config)
    noise, level = clips.normal("noise"), sigma[:, :, None, None, None]
    noisy = (1.0 - level) * latents + level * noise
    keep = clips.uniform("controls_dropout") >= config.controls_dropout
    velocity = model(noisy, sigma, drop_controls(clips.conditions, keep), sequence)
    wide = velocity.to(accumulation_dtype(velocity.dtype))  # fp32, or fp64 of an fp64 model
    error = (wide - (noise - latents)).square().mean(dim=(2, 3, 4))  # [B, t]
    every = torch.ones_like(sigma)
    metrics = {"sigma": sequence.mean(sigma, every), "controls": keep.float()}
    return ObjectiveOutput(sequence.mean(error, every), metrics)


def frame_sigma(clips: Clips, config: DiffusionForcingConfig) -> Tensor:
    """Draw the noise level of each local frame, fp32 [B, t]: logit-normal, then shifted.

    Those of the whole clip are computed, and cut: processors round the ends of a row otherwise than
    its middle, and the noise embedding multiplies a level by 1000.
    """
    frames = clips.sequence.frames
    gaussian = normal(clips.key, "sigma", clips.draws, (0, clips.sequence.clip_frames), ())
    plain = torch.sigmoid(config.sigma_mean + config.sigma_std * gaussian)
    return shift_sigma(plain, config.flow_shift)[:, frames.start : frames.stop]


def drop_controls(conditions: Conditions, keep: Tensor) -> Conditions:
    """Drop the controls of the clips where keep [B] is False, and those that were dropped."""
    before = conditions.controls_keep
    return replace(conditions, controls_keep=keep if before is None else keep & before)
