"""Sample clips: first latent frame and camera path -> latents, by steps of the learned flow.

`rollout` denoises the whole clip at once, `stream.stream_rollout` chunk by chunk, as chunk-causal
models are deployed. Both take the same noise, levels, guidance and experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import accumulation_dtype
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.experts import Experts, Model, experts_of
from wm_train.sampling.guidance import UNGUIDED, Guidance, guidance_views, guided, velocities
from wm_train.sampling.levels import first_frames
from wm_train.sampling.steps import denoise


@torch.no_grad()
def rollout(
    model: Model | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    sequence: SequenceShard,
    *,
    guidance: Guidance = UNGUIDED,
    sampler: str = "euler",
    clean_first: bool = True,
) -> Tensor:
    """Return the local frames of sampled clips, fp32 [B, t, C, h, w], all denoised together.

    model: one for all noise levels, or experts; first_latent: [B, C, h, w], normalised, stays clean
    at the clip's first frame; levels: of `sampling_levels`; draws: int64 [B], which key the noise;
    guidance: condition -> weight (1: plain; above 1 the prediction without the condition is pushed
    away from), at one pass more for each; sampler: euler | renoise; clean_first: False for a model
    that reads the first image by its conditions, of which every frame is sampled.
    """
    experts, views = experts_of(model), guidance_views(conditions, guidance, draws)
    shards = [sequence] * len(views)

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        made = velocities(experts.at(sigma), latents, level, views, shards)
        return guided(made, experts.weights(sigma, guidance))

    def fresh(step: int) -> Tensor:
        frames, shape = (sequence.frames.start, sequence.frames.stop), first_latent.shape[1:]
        return normal(key, f"rollout/step{step}", draws, frames, shape)

    noise, clean, given = start_of(sequence.layout, sequence.frames, first_latent, key, draws)
    start = (noise, clean & clean_first, given)
    return denoise(velocity, *start, levels, sampler=sampler, fresh=fresh).clean


def start_of(
    layout: ClipLayout,
    frames: FrameRange,
    first_latent: Tensor,
    key: NoiseKey,
    draws: Tensor,
    purpose: str = "rollout",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the start of these frames of a clip: noise [B, t, C, h, w], a mask of given frames [B,
    t], and their values [B, t, C, h, w]. purpose: of the noise."""
    b, *shape = first_latent.shape
    noise = normal(key, purpose, draws, (frames.start, frames.stop), tuple(shape))
    clean = first_frames(layout, frames, first_latent.device)[None].expand(b, len(frames))
    given = first_latent.to(accumulation_dtype(first_latent.dtype))
    return noise, clean, given[:, None].expand(b, len(frames), *shape)
