"""Sample clips chunk by chunk, as chunk-causal models are deployed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE, Kernels
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey
from wm_train.sampling.chunks import Streams, chunk_exits
from wm_train.sampling.experts import Experts, Model, experts_of
from wm_train.sampling.guidance import UNGUIDED, Guidance, guidance_views


@torch.no_grad()
def stream_rollout(
    model: Model | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    layout: ClipLayout,
    *,
    guidance: Guidance = UNGUIDED,
    sampler: str = "euler",
    context_sigma: float = 0.0,
    kernels: Kernels = REFERENCE,
) -> Iterator[Tensor]:
    """Yield the chunks of clips, fp32 [B, t, C, h, w] each, as a chunk-causal model makes them;
    memory does not grow with the clip once the attention window is full (SANA-WM §3.2).

    Every chunk is denoised with a fixed past; then one more pass over the chunk, at context_sigma,
    makes the past of the next. Arguments as for `rollout`; layout: the whole clip with its chunk
    starts, all on this device; kernels: of the device.
    """
    views = guidance_views(conditions, guidance, draws)
    streams = Streams(experts_of(model), views, layout, guidance, kernels)
    given = (streams, first_latent, levels, key, draws)
    for found in chunk_exits(*given, sampler=sampler, context_sigma=context_sigma):
        yield found.clean
