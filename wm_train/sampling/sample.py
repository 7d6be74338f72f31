"""Sample clips with the sampler that a stage names.

A sampler is a function (start, config) -> latents of the local frames; its configuration's `builds`
names it. Another package adds one by an entry point of the group wm_train.samplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.reference import Kernels
from parallel.sequence import WholeClip
from wm_train.conditioning import Conditions
from wm_train.config.kinds import SamplerConfig
from wm_train.noise import NoiseKey
from wm_train.sampling.config import StreamConfig, WindowsConfig
from wm_train.sampling.experts import Experts
from wm_train.sampling.rollout import rollout
from wm_train.sampling.stream import stream_rollout
from wm_train.sampling.windows import window_rollout


@dataclass(frozen=True)
class SampleStart:
    """Hold the inputs of a rollout.

    first_latent: [B, C, h, w], normalised, stays clean at the clip's first frame; conditions: of
    the whole clips; levels: sigmas of the steps and the 0 after them; draws: int64 [B], positions
    in the sample stream that key the noise; sequence: the local frames and the whole clip's layout;
    clean_first: whether the model takes the first latent so, and not by its conditions.
    """

    experts: Experts
    first_latent: Tensor
    conditions: Conditions
    levels: Sequence[float]
    key: NoiseKey
    draws: Tensor
    sequence: WholeClip
    kernels: Kernels
    clean_first: bool = True


def euler(start: SampleStart, config: SamplerConfig) -> Tensor:
    """Return the local frames, fp32 [B, t, C, h, w], of clips denoised as a whole."""
    return _whole_clips(start, config, "euler")


def renoise(start: SampleStart, config: SamplerConfig) -> Tensor:
    """Return the local frames, fp32 [B, t, C, h, w], of clips denoised as a whole, with fresh noise
    in every step."""
    return _whole_clips(start, config, "renoise")


def _whole_clips(start: SampleStart, config: SamplerConfig, sampler: str) -> Tensor:
    given = (start.experts, start.first_latent, start.conditions, start.levels, start.key)
    how = {"guidance": config.guidance, "sampler": sampler, "clean_first": start.clean_first}
    return rollout(*given, start.draws, start.sequence, **how)  # type: ignore[arg-type]


def stream(start: SampleStart, config: StreamConfig) -> Tensor:
    """Return the local frames, fp32 [B, t, C, h, w], of clips made chunk by chunk.

    Every caller computes all frames, as a chunk is too short to be split.
    """
    given = (start.experts, start.first_latent, start.conditions, start.levels, start.key)
    layout, local = start.sequence.layout, start.sequence.frames
    chunks = stream_rollout(
        *given,
        start.draws,
        layout,
        guidance=config.guidance,
        sampler=config.step,
        context_sigma=config.context_sigma,
        kernels=start.kernels,
    )
    return torch.cat(list(chunks), dim=1)[:, local.start : local.stop]


def windows(start: SampleStart, config: WindowsConfig) -> Tensor:
    """Return the local frames, fp32 [B, t, C, h, w], of clips made chunk by chunk in windows, each
    of which is split over the ranks."""
    given = (start.experts, start.first_latent, start.conditions, start.levels, start.key)
    chunks = window_rollout(
        *given,
        start.draws,
        start.sequence,
        config.history,
        guidance=config.guidance,
        sampler=config.step,
    )
    local = start.sequence.frames
    return torch.cat([one.clean for one in chunks], dim=1)[:, local.start : local.stop]
