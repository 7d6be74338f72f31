"""Sampling a clip: first latent frame and camera path -> latents, by Euler steps of the learned flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout
from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.models.streaming import StreamingSequence, StreamState
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.flow_matching import first_frames, shift_sigma


@dataclass(frozen=True)
class Experts:
    """Models that were trained on parts of the noise: `models[i]` makes the steps that start at `boundaries[i]` or above. Boundaries fall,
    and the last one is 0 (Wan2.2's two experts, MoWorld §3)."""

    boundaries: tuple[float, ...]
    models: tuple[nn.Module, ...]

    def at(self, sigma: float) -> nn.Module:
        """Whose step the one from noise level sigma is."""
        return next(model for boundary, model in zip(self.boundaries, self.models, strict=True) if sigma >= boundary)


@torch.no_grad()
def rollout(
    model: nn.Module | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    steps: int,
    key: NoiseKey,
    draws: Tensor,
    sequence: SequenceShard,
    *,
    flow_shift: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Local frames of a sampled batch of clips, fp32 [B, t, C, h, w].

    first_latent: [B, C, h, w], normalised, held clean at the first frame of the clip; draws: int64 [B], which noise each clip starts
    from; model: one for all noise levels, or experts; flow_shift: spacing of the steps, as in training; guidance: weight of the camera
    (1: plain; above 1 the prediction without a camera is pushed away from, at twice the cost). Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"rollout failed: got {steps} steps, expected at least 1 (key trainer.sample_steps). Fix: trainer.sample_steps=20")
    local = (sequence.frames.start, sequence.frames.stop)
    b = first_latent.shape[0]
    clean = first_frames(sequence, first_latent.device)[None, :].expand(b, local[1] - local[0])
    given = first_latent.float()[:, None].expand(b, local[1] - local[0], *first_latent.shape[1:])
    noise = normal(key, "rollout", draws, local, tuple(first_latent.shape[1:]))
    without = replace(conditions, camera_keep=torch.zeros(b, dtype=torch.bool, device=first_latent.device))

    # The step's own level, not the largest of `level`: who holds only given frames sees zeros there, and must run the same expert.
    sigmas = iter(step_levels(steps, flow_shift))

    def velocity(latents: Tensor, level: Tensor) -> Tensor:
        sigma = next(sigmas)
        expert = model.at(sigma) if isinstance(model, Experts) else model
        seen = expert(latents, level, conditions, sequence).float()
        if guidance == 1.0:
            return seen
        plain = expert(latents, level, without, sequence).float()
        return plain + guidance * (seen - plain)

    return euler(velocity, noise, clean, given, steps, flow_shift)


@torch.no_grad()
def stream_rollout(
    model: nn.Module,
    first_latent: Tensor,
    conditions: Conditions,
    steps: int,
    key: NoiseKey,
    draws: Tensor,
    layout: ClipLayout,
    *,
    flow_shift: float = 1.0,
) -> Iterator[Tensor]:
    """Yield the chunks of a clip, fp32 [B, t, C, h, w] each, as a chunk-causal model makes them; memory does not grow with the clip
    once the attention window is full (SANA-WM §3.2).

    Every chunk is denoised while the past stays as it is, then seen once more clean, and that pass makes the state of the next.
    Arguments as for `rollout`; layout: the whole clip with its chunk starts.
    """
    state = StreamState()
    for start in layout.chunk_starts:
        chunk = layout.chunk_of(start)
        b, t = first_latent.shape[0], len(chunk)
        clean = (torch.arange(start, chunk.stop, device=first_latent.device) == 0)[None].expand(b, t)
        given = first_latent.float()[:, None].expand(b, t, *first_latent.shape[1:])
        noise = normal(key, "rollout", draws, (start, chunk.stop), tuple(first_latent.shape[1:]))

        def velocity(latents: Tensor, level: Tensor, state: StreamState = state) -> Tensor:
            return model(latents, level, conditions, StreamingSequence(layout, state)).float()

        latents = euler(velocity, noise, clean, given, steps, flow_shift)
        sequence = StreamingSequence(layout, state)
        model(latents, torch.zeros(b, t, device=latents.device), conditions, sequence)
        state = sequence.after()
        yield latents


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, clean: Tensor, given: Tensor, steps: int, flow_shift: float
) -> Tensor:
    """Euler steps from noise [B, t, C, h, w] at sigma 1 to data at 0; frames marked in clean [B, t] stay `given`, at sigma 0.

    velocity(latents, sigma [B, t]) -> [B, t, C, h, w], called once per step.
    """
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, noise)
    for sigma, following in pairwise(step_levels(steps, flow_shift)):
        latents = torch.where(hold, given, latents + (following - sigma) * velocity(latents, torch.where(clean, 0.0, sigma)))
    return latents


def step_levels(steps: int, flow_shift: float) -> list[float]:
    """Where the Euler steps start, from 1 down, and after them 0."""
    levels: list[float] = shift_sigma(torch.linspace(1.0, 0.0, steps + 1), flow_shift).tolist()
    return levels
