"""Train by rectified-flow matching with one noise level per clip and the first latent frame given
(SANA-WM §5.1; Liu et al. 2023; SD3 §3.1).

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, sigma = shifted sigmoid of a normal. Every
random choice is a function of (seed, stage, draw, latent frame), so the loss does not depend on how
clips and frames are spread over devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from wm_train.conditioning import Conditions, drop_text
from wm_train.models.spec import WorldModel
from wm_train.noise import NoiseKey, normal, uniform
from wm_train.objectives.clips import Clips, ObjectiveOutput
from wm_train.objectives.config import FlowMatchingConfig
from wm_train.sampling.levels import first_frames, shift_sigma, unshift_sigma


def clip_sigma(key: NoiseKey, draws: Tensor, config: FlowMatchingConfig) -> Tensor:
    """Draw one noise level per clip, fp32 [B]: logit-normal, then shifted."""
    return shift_sigma(plain_sigma(key, draws, config), config.flow_shift)


def plain_sigma(key: NoiseKey, draws: Tensor, config: FlowMatchingConfig) -> Tensor:
    """Draw the logit-normal noise level of each clip before the shift, fp32 [B], from the part of
    the distribution that the shift moves into sigma_min to sigma_max: by its inverse distribution
    function, so that no mass piles up at the ends of the range."""
    gaussian = normal(key, "sigma", draws, (0, 1), ())[:, 0]
    if config.sigma_min == 0.0 and config.sigma_max == 1.0:
        return torch.sigmoid(config.sigma_mean + config.sigma_std * gaussian)
    quantile = torch.special.ndtr(gaussian.cpu().double())
    given = (config.sigma_mean, config.sigma_std, plain_range(config))
    return truncated_logit_normal(quantile, *given).to(gaussian.device)


def truncated_logit_normal(
    quantile: Tensor, mean: float, std: float, ends: tuple[float, float]
) -> Tensor:
    """Return the noise levels, fp32, at these quantiles (fp64, in (0, 1), on the host, as some
    devices have no fp64) of sigmoid(mean + std * normal) between two ends, before any shift."""
    bounds = torch.tensor(ends, dtype=torch.float64)
    low, high = torch.special.ndtr((torch.logit(bounds) - mean) / std)
    truncated = torch.special.ndtri(low + (high - low) * quantile)
    plain = torch.sigmoid(mean + std * truncated)
    return plain.clamp(bounds[0], bounds[1]).float()  # clamp: rounding only


def plain_range(config: FlowMatchingConfig) -> tuple[float, float]:
    """Return sigma_min and sigma_max before the shift."""
    return unshift_sigma(config.sigma_min, config.flow_shift), unshift_sigma(
        config.sigma_max, config.flow_shift
    )


def dropped_conditions(
    conditions: Conditions, key: NoiseKey, draws: Tensor, config: FlowMatchingConfig
) -> Conditions:
    """Drop the camera of some clips and replace the text of some by the null text, so that the
    model also learns without them."""
    if config.camera_dropout > 0.0:
        keep = uniform(key, "camera_dropout", draws) >= config.camera_dropout
        conditions = replace(
            conditions,
            camera_keep=keep if conditions.camera_keep is None else keep & conditions.camera_keep,
        )
    if config.text_dropout > 0.0 and conditions.text is not None:
        conditions = drop_text(
            conditions, uniform(key, "text_dropout", draws) < config.text_dropout
        )
    return conditions


def flow_matching(model: WorldModel, clips: Clips, config: FlowMatchingConfig) -> ObjectiveOutput:
    """Return the mean squared error of the velocity over all frames that were not given, per clip;
    one noise level per clip.

    With probability `image_condition` a clip's first latent frame (of each document) is given
    clean, at sigma 0 and without loss; a document of one frame is never given. Metrics: sigma,
    image_condition.
    """
    sigma = clip_sigma(clips.key, clips.draws, config)
    frame_sigma = sigma[:, None].expand(len(clips.draws), len(clips.sequence.frames))
    return velocity_loss(model, clips, config, frame_sigma, {"sigma": sigma})


def velocity_loss(
    model: WorldModel,
    clips: Clips,
    config: FlowMatchingConfig,
    frame_sigma: Tensor,
    metrics: Mapping[str, Tensor],
) -> ObjectiveOutput:
    """Return the rectified-flow loss at given noise levels of the local frames, [B, t]. Frames at
    sigma 0 are context and have zero weight."""
    latents, sequence = clips.latents, clips.sequence
    given = clips.uniform("image_condition") < config.image_condition  # [B]
    first = first_frames(sequence.layout, sequence.frames, latents.device)
    frame_sigma = torch.where(given[:, None] & first[None, :], 0.0, frame_sigma)
    noise, level = clips.normal("noise"), frame_sigma[:, :, None, None, None]
    noisy = (1.0 - level) * latents + level * noise
    seen = dropped_conditions(clips.conditions, clips.key, clips.draws, config)
    velocity = model(noisy, frame_sigma, seen, sequence)
    error = (velocity.float() - (noise - latents)).square().mean(dim=(2, 3, 4))  # [B, t]
    loss = sequence.mean(error, (frame_sigma > 0).float())
    return ObjectiveOutput(loss, {**metrics, "image_condition": given.float()})
