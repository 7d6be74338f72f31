"""Rectified-flow matching with one noise level per clip and the first latent frame given (SANA-WM §5.1; Liu et al. 2023; SD3 §3.1).

x_sigma = (1 - sigma) x0 + sigma eps, target eps - x0, sigma = shifted sigmoid of a normal. Every random choice is a function of (seed,
stage, draw, latent frame), so the loss does not depend on how clips and frames are spread over devices (design §5).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.config import ObjectiveConfig
from wm_train.noise import NoiseKey, normal, uniform
from wm_train.objectives.output import ObjectiveOutput, TrainingBatch


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1 as long videos need: sigma -> shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def clip_sigma(key: NoiseKey, draws: Tensor, config: ObjectiveConfig) -> Tensor:
    """One noise level per clip, fp32 [B]: logit-normal, then shifted."""
    gaussian = normal(key, "sigma", draws, (0, 1), ())[:, 0]
    return shift_sigma(torch.sigmoid(config.sigma_mean + config.sigma_std * gaussian), config.flow_shift)


def dropped_conditions(conditions: Conditions, key: NoiseKey, draws: Tensor, config: ObjectiveConfig) -> Conditions:
    """Drop the camera of some clips, so that the model also learns without it."""
    if config.camera_dropout == 0.0:
        return conditions
    keep = uniform(key, "camera_dropout", draws) >= config.camera_dropout
    return replace(conditions, camera_keep=keep if conditions.camera_keep is None else keep & conditions.camera_keep)


def flow_matching(
    model: nn.Module, batch: TrainingBatch, key: NoiseKey, config: ObjectiveConfig, sequence: SequenceShard, conditions: Conditions
) -> ObjectiveOutput:
    """Mean squared error of the velocity over all frames that were not given, per clip.

    With probability `image_condition` a clip's first latent frame (of each document) is given clean, at sigma 0 and without
    loss; a document of one frame is never given. Metrics: sigma, image_condition.
    """
    latents, draws = batch.latents, batch.draws.to(batch.latents.device)
    c, h, w = latents.shape[2:]
    local = (sequence.frames.start, sequence.frames.stop)
    sigma = clip_sigma(key, draws, config)
    given = uniform(key, "image_condition", draws) < config.image_condition  # [B]
    clean = given[:, None] & first_frames(sequence, latents.device)[None, :]  # [B, t]
    frame_sigma = torch.where(clean, 0.0, sigma[:, None])
    noise = normal(key, "noise", draws, local, (c, h, w))
    level = frame_sigma[:, :, None, None, None]
    noisy = (1.0 - level) * latents + level * noise
    velocity = model(noisy, frame_sigma, dropped_conditions(conditions, key, draws, config), sequence)
    error = (velocity.float() - (noise - latents)).square().mean(dim=(2, 3, 4))  # [B, t]
    return ObjectiveOutput(sequence.mean(error, (~clean).float()), {"sigma": sigma, "image_condition": given.float()})


def first_frames(sequence: SequenceShard, device: torch.device) -> Tensor:
    """bool [t]: local frames that start a document of more than one frame."""
    layout = sequence.layout
    ends = [*layout.document_starts[1:], layout.frames]
    starts = {start for start, end in zip(layout.document_starts, ends) if end - start > 1}
    return torch.tensor([frame in starts for frame in range(sequence.frames.start, sequence.frames.stop)], dtype=torch.bool, device=device)
