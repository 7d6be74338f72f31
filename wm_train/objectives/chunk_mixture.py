"""Train by flow matching with a noise level per chunk, for the chunk-causal stage (SANA-WM §3.2;
the public stage-1 chunk-causal configuration).

A clip draws one of four patterns, with the shares `chunk_mixture`:
  same          all chunks at one sigma
  incremental   one chunk, any, at sigma; noise never falls from a chunk to the next
  anchored      the last chunk at sigma; noise never falls from a chunk to the next
  clean past    the last chunk at sigma, all before it clean (teacher forcing)
Levels that never fall are drawn uniformly among all such sequences through the anchor: sorted
uniform numbers below it for the chunks before and above it for those after. That is the continuous
form of AR-Diffusion's combinatorial sampler, which the public code runs over 1000 discrete steps.
The shift comes after, so the order is that of the shifted levels too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wm_train.models.spec import WorldModel
from wm_train.noise import NoiseKey, random_words, uniform, unit_interval
from wm_train.objectives.clips import Clips, ObjectiveOutput
from wm_train.objectives.config import ChunkMixtureConfig
from wm_train.objectives.flow_matching import plain_range, plain_sigma, velocity_loss
from wm_train.sampling.levels import shift_sigma

SAME, INCREMENTAL, ANCHORED, CLEAN_PAST = range(4)


def chunk_mixture(model: WorldModel, clips: Clips, config: ChunkMixtureConfig) -> ObjectiveOutput:
    """Return the velocity loss with a noise level per chunk of the layout. Metrics: sigma (of the
    anchor chunk), pattern (0-3), image_condition.

    Raises ValueError for a layout of one chunk.
    """
    layout, key, draws = clips.sequence.layout, clips.key, clips.draws
    chunks = len(layout.chunk_starts)
    if chunks == 1:
        raise ValueError(
            f"chunk mixture failed: got {layout.frames} latent frames in one chunk, expected"
            " several (key chunk_frames of the stage). Fix: chunk_frames=3 and longer clips, or"
            " objective.name=flow_matching"
        )
    pattern, sigma = draw_pattern(key, draws, config), plain_sigma(key, draws, config)
    plain = chunk_levels(key, draws, pattern, sigma, chunks, plain_range(config))
    levels = shift_sigma(plain, config.flow_shift)
    metrics = {"sigma": shift_sigma(sigma, config.flow_shift), "pattern": pattern.float()}
    return velocity_loss(model, clips, config, levels[:, clips.chunk_index()], metrics)


def draw_pattern(key: NoiseKey, draws: Tensor, config: ChunkMixtureConfig) -> Tensor:
    """Draw the pattern of each clip, int64 [B], in the shares of `config.chunk_mixture`."""
    shares = torch.tensor(config.chunk_mixture, dtype=torch.float32, device=draws.device).cumsum(0)
    return (uniform(key, "chunk_pattern", draws)[:, None] * shares[-1] >= shares[:-1]).sum(1)


def chunk_levels(
    key: NoiseKey,
    draws: Tensor,
    pattern: Tensor,
    sigma: Tensor,
    chunks: int,
    ends: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Draw the noise level of every chunk before the shift, fp32 [B, chunks], between `ends`; the
    anchor chunk has `sigma` [B]."""
    b = len(draws)
    any_chunk = (uniform(key, "chunk_anchor", draws) * chunks).long().clamp(max=chunks - 1)
    anchor = torch.where(pattern == INCREMENTAL, any_chunk, chunks - 1)[:, None]
    words = random_words(key, "chunk_levels", draws, (0, 1), chunks)
    free = unit_interval(words).reshape(b, words.shape[2] * 4)[:, :chunks]
    place = torch.arange(chunks, device=draws.device)[None, :]
    before = place < anchor
    # Sort the numbers of either side on its own: those below the anchor chunk first, moved apart by
    # a whole unit.
    side = torch.where(before, 0.0, torch.where(place == anchor, 1.0, 2.0))
    ordered = (free + side).sort(dim=1).values - side
    low, high = ends
    below = low + ordered * (sigma[:, None] - low)
    above = sigma[:, None] + ordered * (high - sigma[:, None])
    rising = torch.where(before, below, above)
    rising = torch.where(place == anchor, sigma[:, None], rising)
    clean = torch.where(place == anchor, sigma[:, None], 0.0)
    chosen = pattern[:, None]
    return torch.where(
        chosen == SAME, sigma[:, None], torch.where(chosen == CLEAN_PAST, clean, rising)
    )
