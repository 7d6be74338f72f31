"""Guide samples: one pass of the model per view of the conditions, then their weighted
difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from parallel.local_attention import accumulation_dtype
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.sampling.experts import Model

Guidance = Mapping[str, float]
Shards = Sequence[SequenceShard]
UNGUIDED: Guidance = MappingProxyType({})


def guidance_views(conditions: Conditions, guidance: Guidance, draws: Tensor) -> list[Conditions]:
    """Return the conditions of each pass of a step: all of them, and for camera guidance all but
    the camera."""
    if guidance.get("camera", 1.0) == 1.0:
        return [conditions]
    return [conditions, replace(conditions, camera_keep=torch.zeros_like(draws, dtype=torch.bool))]


def velocities(
    model: Model, latents: Tensor, level: Tensor, views: Sequence[Conditions], shards: Shards
) -> list[Tensor]:
    """Return the model's output for each view of the conditions, at least fp32 [B, t, C, h, w]."""
    pairs = zip(views, shards, strict=True)
    out = [model(latents, level, view, shard) for view, shard in pairs]
    return [velocity.to(accumulation_dtype(velocity.dtype)) for velocity in out]


def guided(velocities: Sequence[Tensor], guidance: Guidance) -> Tensor:
    """Return plain + weight * (seen - plain), or `seen` if there was no plain pass."""
    seen, *without = velocities
    for plain in without:
        seen = plain + guidance["camera"] * (seen - plain)
    return seen
