"""Make example clips for the parity proof, the planner and FLOP counts, without recorded data.

The maths does not depend on the picture's size, so pictures may be small. All numbers are keyed by
(seed, name, clip, frame), as in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_shards.time_layout import TimeLayout
from wm_train.conditioning import Conditions
from wm_train.config.kinds import Needs
from wm_train.noise import PARITY, NoiseKey, normal

PIXELS = 16  # of a latent's side
START_VIDEO = 2  # latents of an image followed by zeros: fewer than a clip has, as stored ones are


@dataclass(frozen=True)
class ExampleShape:
    """Describe a batch of example clips: B, T, latent rows and columns, raw frames per latent, of
    which the first has one unless `grouped`."""

    batch: int
    frames: int
    height: int
    width: int
    temporal_stride: int
    text_tokens: int = 6
    grouped: bool = False

    @property
    def time(self) -> TimeLayout:
        """Return which raw frames each latent frame encodes."""
        return TimeLayout(self.temporal_stride, "grouped" if self.grouped else "causal")


def example_latents(needs: Needs, shape: ExampleShape, seed: int) -> Tensor:
    """Return latents [B, T, C, h, w], fp32."""
    draws, frames = torch.arange(shape.batch), (0, shape.frames)
    sizes = (needs.latent_channels, shape.height, shape.width)
    return normal(NoiseKey(seed, PARITY), "latents", draws, frames, sizes)


def example_conditions(needs: Needs, shape: ExampleShape, seed: int) -> Conditions:
    """Return the model's conditions: a panning, moving camera, different for each clip, at
    raw-frame rate; text and controls if the model takes them."""
    batch, raw = shape.batch, shape.time.raw(shape.frames)
    height, width = shape.height * PIXELS, shape.width * PIXELS
    steps = torch.arange(raw, dtype=torch.float32)[None] * (1 + torch.arange(batch))[:, None] / raw
    c2w = torch.eye(4).repeat(batch, raw, 1, 1)
    c2w[..., 0, 0], c2w[..., 0, 2] = steps.cos(), steps.sin()
    c2w[..., 2, 0], c2w[..., 2, 2] = -steps.sin(), steps.cos()
    c2w[..., 0, 3], c2w[..., 2, 3] = steps.sin(), steps
    pinhole = torch.tensor([0.9 * width, 0.9 * width, width / 2, height / 2])
    text = mask = controls = None
    if needs.text_width:
        draws, tokens = torch.arange(batch), needs.text_tokens or shape.text_tokens
        sizes = (needs.text_width,)
        text = normal(NoiseKey(seed, PARITY), "text", draws, (0, tokens), sizes)
        mask = torch.arange(tokens)[None] < tokens - draws[:, None] % 3
    if needs.control_width:
        draws, sizes = torch.arange(batch), (needs.control_width,)
        controls = normal(NoiseKey(seed, PARITY), "controls", draws, (0, shape.frames), sizes)
    return Conditions.of(
        (height, width),
        shape.temporal_stride,
        c2w,
        pinhole.repeat(batch, raw, 1),
        text=text,
        text_mask=mask,
        controls=controls,
        grouped=shape.grouped,
        **_image_fields(needs, shape, seed),
    )


def _image_fields(needs: Needs, shape: ExampleShape, seed: int) -> dict[str, Tensor]:
    """Return what a model reads of a clip's first image."""
    key, draws = NoiseKey(seed, PARITY), torch.arange(shape.batch)
    found = {}
    if "start_video" in needs.fields:
        frames = min(shape.frames, START_VIDEO)
        sizes = (needs.latent_channels, shape.height, shape.width)
        found["start_video"] = normal(key, "start_video", draws, (0, frames), sizes)
    if "clip_image" in needs.fields:
        tokens, width = needs.clip_image
        found["clip_image"] = normal(key, "clip_image", draws, (0, tokens), (width,))
    return found
