"""Solve a teacher's flow from keyed noise to clean clips, and keep its states at some levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from data_shards.loading.batch import Batch
from wm_train.config.roles import TrajectoriesConfig
from wm_train.models.spec import WorldModel
from wm_train.objectives.ode_regression import START
from wm_train.sampling.chunks import Streams
from wm_train.sampling.experts import experts_of
from wm_train.sampling.guidance import guidance_views, guided, velocities
from wm_train.sampling.levels import trajectory_levels
from wm_train.sampling.rollout import start_of
from wm_train.sampling.steps import Velocity, denoise
from wm_train.training.data import conditions_of, first_latents, sequence_of
from wm_train.training.stage import Stage

Start = tuple[Tensor, Tensor, Tensor]  # noise, mask of given frames, their values


@torch.no_grad()
def solve(stage: Stage, teacher: WorldModel, batch: Batch, config: TrajectoriesConfig) -> Tensor:
    """Return the states of whole clips, fp32 [B, T, K, C, h, w]: at the objective's levels but the
    first, whose state is the noise that `batch.draws` key, and at the end.

    Every rank of a sequence group gets all frames. A given first frame is clean in every state.
    """
    kept = stage.config.objective.trajectory_levels()
    levels = trajectory_levels(kept, config.steps, config.shift)
    views = guidance_views(conditions_of(stage, batch), config.guidance, batch.draws)
    first, sequence = (
        first_latents(stage, batch),
        sequence_of(stage, batch, config.teacher.chunk_frames),
    )
    if config.teacher.model.needs().causal:
        kernels, experts = stage.kernels, experts_of(teacher)
        streams = Streams(experts, views, sequence.layout, config.guidance, kernels)
        return torch.cat(list(chunk_states(streams, batch.draws, first, levels, kept[1:])), dim=1)

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        passes = velocities(teacher, latents, level, views, [sequence] * len(views))
        return guided(passes, config.guidance)

    start = start_of(sequence.layout, sequence.frames, first, START, batch.draws, "start")
    return sequence.gather([states(velocity, start, levels, kept[1:])])[0]


def chunk_states(
    streams: Streams, draws: Tensor, first: Tensor, levels: Sequence[float], kept: Sequence[float]
) -> Iterator[Tensor]:
    """Yield the states of one chunk after another, [B, t, K, C, h, w]; the ends of those before are
    its past."""
    layout = streams.layout
    for at in layout.chunk_starts:
        chunk = layout.chunk_of(at)
        start = start_of(layout, chunk, first, START, draws, "start")
        found = states(streams.velocity, start, levels, kept)
        yield found
        if chunk.stop < layout.frames:
            end = found[:, :, -1]
            streams.remember(end, torch.zeros_like(end[:, :, 0, 0, 0]))


def states(
    velocity: Velocity, start: Start, levels: Sequence[float], kept: Sequence[float]
) -> Tensor:
    """Return the states at the levels `kept` and at the end of Euler steps through `levels`,
    [B, t, K, C, h, w]."""
    found: dict[float, Tensor] = {}

    def watched(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        if sigma in kept:
            found[sigma] = latents
        return velocity(latents, level, sigma)

    end = denoise(watched, *start, levels, sampler="euler", fresh=_no_noise).clean
    return torch.stack([*(found[sigma] for sigma in kept), end], dim=2)


def _no_noise(step: int) -> NoReturn:
    raise AssertionError("Euler steps take no fresh noise")
