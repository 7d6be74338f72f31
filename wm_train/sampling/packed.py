"""Take a student's gradient of a whole clip in one packed pass, instead of chunk by chunk.

Source: Waypoint-1.5 §4, sequence-packed teacher forcing. The past of a rollout takes no gradient,
and at the end all of it is known: the clean frames, each at the noise level at which it entered the
past. So one pass over them without gradients (`parallel.packed.CleanPass`) and one over the inputs
of all exit steps (`NoisyPass`) give the chunks' exit passes at once; values and gradients are those
of `chunks.late_losses`. A clip's frames may be split over a sequence group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from parallel.packed import CleanPass, Keys, NoisyPass
from parallel.sequence import WholeClip
from wm_train.conditioning import Conditions
from wm_train.sampling.chunks import ChunkExit
from wm_train.sampling.experts import Model
from wm_train.sampling.guidance import UNGUIDED, Guidance, guided, velocities
from wm_train.sampling.steps import Velocity, clean_of

# (the clip, its number, the student's velocity at its noisy latents, with gradients; the student)
# -> a scalar
LossBeside = Callable[[ChunkExit, int, Tensor, Velocity], Tensor]


def behind_clean(
    model: Model,
    clip: ChunkExit,
    views: Sequence[Conditions],
    shards: Sequence[WholeClip],
    guidance: Guidance = UNGUIDED,
) -> Velocity:
    """Return a network as a function (latents, level, sigma) -> velocity [b, t, C, h, w] of all
    local frames, each behind the clean frames before it, guided by its views of the conditions.

    clip: local frames of whole clips, whose `context` at `context_level` is the past; shards: one
    per view.
    """
    kept: list[list[Keys]] = []
    with torch.no_grad():
        for view, shard in zip(views, shards, strict=True):
            clean = CleanPass(shard)
            model(clip.context, clip.context_level, view, clean)
            kept.append(clean.kept)

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        passes = [NoisyPass(shard, keys) for shard, keys in zip(shards, kept, strict=True)]
        return guided(velocities(model, latents, level, views, passes), guidance)

    return velocity


def packed_losses(
    model: Model,
    clips: Sequence[ChunkExit],
    conditions: Conditions,
    g: Tensor,
    sequence: WholeClip,
    beside: LossBeside | None = None,
) -> Iterator[Tensor]:
    """Yield for each clip a scalar whose gradient, summed over the sequence group, is the clip's
    part of the student's: the sum of g times the clean prediction of the local frames.

    clips: local frames of one clip each, [1, t, …]; g: [B, t, C, h, w], the loss's gradient with
    respect to their clean predictions; sequence: in the layout of the student's chunks; beside: a
    loss besides that by g. Back-propagate each before the next is taken.
    """
    for number, found in enumerate(clips):
        own = slice(number, number + 1)
        student = behind_clean(model, found, [conditions.rows(own)], [sequence])
        flow = student(found.noisy, found.level, found.sigma)
        free = (found.level > 0)[:, :, None, None, None]
        clean = torch.where(free, clean_of(found.noisy, flow, found.sigma), found.clean)
        loss = (g[own].detach() * clean).sum()
        yield loss if beside is None else loss + beside(found, number, flow, student)


def row_of(clips: ChunkExit, number: int) -> ChunkExit:
    """Return one clip of several."""
    own = slice(number, number + 1)
    return ChunkExit(
        clips.chunk,
        clips.noisy[own],
        clips.level[own],
        clips.sigma,
        clips.clean[own],
        None,
        clips.context[own],
        clips.context_level[own],
    )
