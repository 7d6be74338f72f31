"""Sample clips: first latent frame and camera path -> latents, by Euler steps of the learned flow.

`rollout` denoises the whole clip at once, `stream_rollout` chunk by chunk, as chunk-causal
models are deployed. Both take the same noise, levels, guidance and experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout, FrameRange
from parallel.reference import REFERENCE, Kernels
from parallel.sequence import SequenceShard
from parallel.streaming import StreamingSequence, StreamState
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.flow_matching import first_frames, shift_sigma

Guidance = Mapping[str, float]
Shards = Sequence[SequenceShard | StreamingSequence]
UNGUIDED: Guidance = MappingProxyType({})


@dataclass(frozen=True)
class Experts:
    """Models that were trained on parts of the noise: `models[i]` makes the steps that start at
    `boundaries[i]` or above. Boundaries fall, and the last one is 0 (Wan2.2's two experts,
    MoWorld §3)."""

    boundaries: tuple[float, ...]
    models: tuple[nn.Module, ...]

    def at(self, sigma: float) -> nn.Module:
        """Return the model that makes the step from noise level sigma."""
        pairs = zip(self.boundaries, self.models, strict=True)
        return next(model for boundary, model in pairs if sigma >= boundary)


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

    model: one for all noise levels, or experts; first_latent: [B, C, h, w], normalised, held
    clean at the clip's first frame; levels: of `sampling_levels`; draws: int64 [B], which noise
    each clip starts from; guidance: condition -> weight, today of the camera (1: plain; above 1
    the prediction without a camera is pushed away from, at twice the cost).
    """
    experts, views = experts_of(model), guidance_views(conditions, guidance, draws)
    shards = [sequence] * len(views)

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        return guided(velocities(experts.at(sigma), latents, level, views, shards), guidance)

    start = start_of(sequence.layout, sequence.frames, first_latent, key, draws)
    return euler(velocity, *start, levels)


@torch.no_grad()
def stream_rollout(
    model: nn.Module | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    layout: ClipLayout,
    *,
    guidance: Guidance = UNGUIDED,
    kernels: Kernels = REFERENCE,
) -> Iterator[Tensor]:
    """Yield the chunks of clips, fp32 [B, t, C, h, w] each, as a chunk-causal model makes them;
    memory does not grow with the clip once the attention window is full (SANA-WM §3.2).

    Every chunk is denoised while the past stays as it is, then seen once more clean, and that
    pass makes the state of the next. Each expert has a state of its own, and each view of the
    conditions: what one network remembers means nothing to another. Arguments as for `rollout`;
    layout: the whole clip with its chunk starts, all on this device; kernels: of the device.
    """
    experts, views = experts_of(model), guidance_views(conditions, guidance, draws)
    past = {expert: [StreamState()] * len(views) for expert in experts.models}

    def shards(expert: nn.Module) -> list[StreamingSequence]:
        return [StreamingSequence(layout, state, kernels) for state in past[expert]]

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        expert = experts.at(sigma)
        return guided(velocities(expert, latents, level, views, shards(expert)), guidance)

    for start in layout.chunk_starts:
        chunk = layout.chunk_of(start)
        latents = euler(velocity, *start_of(layout, chunk, first_latent, key, draws), levels)
        yield latents
        if chunk.stop == layout.frames:
            return  # no chunk follows that needs the state
        clean = latents.new_zeros(latents.shape[:2])
        for expert in past:
            passed = shards(expert)
            velocities(expert, latents, clean, views, passed)
            past[expert] = [shard.after() for shard in passed]


def experts_of(model: nn.Module | Experts) -> Experts:
    """Return experts as they are, one model as the only expert."""
    return model if isinstance(model, Experts) else Experts((0.0,), (model,))


def guidance_views(conditions: Conditions, guidance: Guidance, draws: Tensor) -> list[Conditions]:
    """Return what each pass of a step sees: everything, and for camera guidance all but the
    camera."""
    if guidance.get("camera", 1.0) == 1.0:
        return [conditions]
    return [conditions, replace(conditions, camera_keep=torch.zeros_like(draws, dtype=torch.bool))]


def velocities(
    model: nn.Module, latents: Tensor, level: Tensor, views: Sequence[Conditions], shards: Shards
) -> list[Tensor]:
    """Return the model's output for each view of the conditions, fp32 [B, t, C, h, w]."""
    pairs = zip(views, shards, strict=True)
    return [model(latents, level, view, shard).float() for view, shard in pairs]


def guided(velocities: Sequence[Tensor], guidance: Guidance) -> Tensor:
    """Return plain + weight * (seen - plain), or what was seen if there was no pass without."""
    seen, *without = velocities
    for plain in without:
        seen = plain + guidance["camera"] * (seen - plain)
    return seen


def start_of(
    layout: ClipLayout, frames: FrameRange, first_latent: Tensor, key: NoiseKey, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where these frames of a clip start: noise [B, t, C, h, w], which of them are given
    [B, t], and with what [B, t, C, h, w]."""
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
    at given frames; `sigma` is the step's own also for a rank that holds only those, so that
    every rank runs the same expert.
    """
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, noise)
    for sigma, following in pairwise(levels):
        step = (following - sigma) * velocity(latents, torch.where(clean, 0.0, sigma), sigma)
        latents = torch.where(hold, given, latents + step)
    return latents


def sampling_levels(levels: int | Sequence[float], flow_shift: float = 1.0) -> list[float]:
    """Return the sigmas of the Euler steps, from 1 down to the 0 after the last one.

    levels: how many steps, spaced evenly and then shifted as in training; or the sigmas at which
    they start, taken as they are. Raises ValueError for fewer than one step.
    """
    if not isinstance(levels, int):
        return [*levels, 0.0]
    if levels < 1:
        raise ValueError(
            f"rollout failed: got {levels} steps, expected at least 1 (key trainer.sample_steps). "
            "Fix: trainer.sample_steps=20"
        )
    shifted: list[float] = shift_sigma(torch.linspace(1.0, 0.0, levels + 1), flow_shift).tolist()
    return shifted
