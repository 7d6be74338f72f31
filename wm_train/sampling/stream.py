"""Sample clips chunk by chunk, as chunk-causal models are deployed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE, Kernels
from parallel.streaming import StreamingSequence, StreamState
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey
from wm_train.sampling.experts import Experts, experts_of
from wm_train.sampling.guidance import UNGUIDED, Guidance, guidance_views, guided, velocities
from wm_train.sampling.rollout import euler, start_of


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

    Every chunk is denoised with a fixed past; then one more pass over the clean chunk makes the
    state of the next. Each expert and each view of the conditions has a state of its own, as a
    state depends on the network. Arguments as for `rollout`; layout: the whole clip with its chunk
    starts, all on this device; kernels: of the device.
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
