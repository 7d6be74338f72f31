"""Guide a network by named conditions: one pass without any of them and one with each, then
v0 + sum_i w_i (v_i - v0) (classifier-free guidance; Waypoint-1.5 eq. 9).

With one condition w = 1 is no guidance; code that computes v + w (v - v0) calls the same scale
w - 1. Outputs are at least fp32 before they are subtracted, as weights multiply their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.local_attention import accumulation_dtype
from parallel.sequence import SequenceShard, WholeClip
from wm_train.conditioning import Conditions, drop_text, replace_text
from wm_train.sampling.experts import Model

Guidance = Mapping[str, float]
Shards = Sequence[SequenceShard]
CONTEXT = "context"
UNGUIDED: Guidance = MappingProxyType({})


def is_off(guidance: Guidance) -> bool:
    """Return whether one pass with all conditions does: no weight, or a single one of 1."""
    return not guidance or list(guidance.values()) == [1.0]


def guidance_views(conditions: Conditions, guidance: Guidance, draws: Tensor) -> list[Conditions]:
    """Return the conditions of each pass of a step: without any of the guided ones, then with each
    alone of them; only all of them where guidance is off."""
    if is_off(guidance):
        return [conditions]
    names, everywhere = set(guidance), torch.ones_like(draws, dtype=torch.bool)
    taken = [names, *(names - {name} for name in guidance)]
    return [without(conditions, one, everywhere) for one in taken]


def guided_passes(
    conditions: Conditions, guidance: Guidance, draws: Tensor, sequence: WholeClip
) -> tuple[list[Conditions], list[WholeClip]]:
    """Return the conditions of each pass over whole clips, as `guidance_views`, and the shard of
    each. `CONTEXT` names the other frames as a condition: without it, each frame is a document of
    its own and attends to itself alone, as the first frame of a clip does in training."""
    if CONTEXT not in guidance:
        views = guidance_views(conditions, guidance, draws)
        return views, [sequence] * len(views)
    named, everywhere = set(guidance) - {CONTEXT}, torch.ones_like(draws, dtype=torch.bool)
    alone = sequence.relaid(frames_apart(sequence.layout))
    bare = without(conditions, named, everywhere)
    views, shards = [bare], [alone]
    for name in guidance:
        seen = bare if name == CONTEXT else without(conditions, named - {name}, everywhere)
        views.append(seen)
        shards.append(sequence if name == CONTEXT else alone)
    return views, shards


def frames_apart(layout: ClipLayout) -> ClipLayout:
    """Return the layout in which each frame is a document of its own."""
    every = tuple(range(layout.frames))
    return ClipLayout(layout.frames, every, every, layout.valid_frames)


def without(conditions: Conditions, names: AbstractSet[str], where: Tensor) -> Conditions:
    """Return the conditions without some, at the clips where [B] is True. Raises ValueError for a
    name that cannot be taken away."""
    for name in sorted(names):
        if name not in TAKEN_AWAY:
            raise ValueError(
                f"guidance failed: got condition {name!r}, expected one of {', '.join(TAKEN_AWAY)}"
                " (key sampler.guidance). Fix: leave it out"
            )
        conditions = TAKEN_AWAY[name](conditions, where)
    return conditions


def _no_camera(conditions: Conditions, where: Tensor) -> Conditions:
    kept = conditions.camera_keep
    return replace(conditions, camera_keep=~where if kept is None else kept & ~where)


def _no_controls(conditions: Conditions, where: Tensor) -> Conditions:
    """Say that controls are unknown; and at rest, for a model that has no other word for it."""
    if conditions.controls is None:
        return conditions
    rest = torch.where(where[:, None, None], 0.0, conditions.controls)
    kept = conditions.controls_keep
    bare = conditions.with_fields(controls=rest)
    return replace(bare, controls_keep=~where if kept is None else kept & ~where)


def _negative_text(conditions: Conditions, where: Tensor) -> Conditions:
    """Put the negative prompt in the place of the text."""
    assert conditions.negative_text is not None, "checked before the start: the data set has one"
    return replace_text(conditions, where, conditions.negative_text)


TAKEN_AWAY: dict[str, Callable[[Conditions, Tensor], Conditions]] = {
    "camera": _no_camera,
    "text": drop_text,
    "negative_text": _negative_text,
    "controls": _no_controls,
}


def velocities(
    model: Model, latents: Tensor, level: Tensor, views: Sequence[Conditions], shards: Shards
) -> list[Tensor]:
    """Return the model's output for each view of the conditions, at least fp32 [B, t, C, h, w]."""
    pairs = zip(views, shards, strict=True)
    out = [model(latents, level, view, shard) for view, shard in pairs]
    return [velocity.to(accumulation_dtype(velocity.dtype)) for velocity in out]


def guided(velocities: Sequence[Tensor], guidance: Guidance) -> Tensor:
    """Return v0 + sum_i w_i (v_i - v0) of the passes of `guidance_views`, or the only one."""
    plain, *seen = velocities
    if not seen:
        return plain
    total = plain
    for weight, velocity in zip(guidance.values(), seen, strict=True):
        total = total + weight * (velocity - plain)
    return total
