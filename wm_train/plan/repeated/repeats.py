"""Trace passes of a rollout that differ in values alone once, and count the others.

A turn of a distillation passes a student over tens of chunks, several times each. On tensors
without values two passes over inputs of the same shapes are the same operators on the same bytes.
So only the first of each kind runs; what it returns and remembers is made anew by shape, and its
work is counted again (`Tracer.repeat`). The same holds for the gradients of a student's chunks, of
which each kind is taken once, and the last, with which gradients are reduced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.streaming import StreamingSequence, StreamState
from wm_train.conditioning import Conditions
from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.score_levels import Judged
from wm_train.objectives.student_rollouts import GRADIENTS, StudentLosses
from wm_train.plan.repeated.passes import (
    Pass,
    Stores,
    all_sizes,
    clip_kind,
    past_kind,
    past_kinds,
    pasts_anew,
    pasts_of,
)
from wm_train.plan.tracing import Tracer
from wm_train.sampling import chunks, windows
from wm_train.sampling.chunks import ChunkExit, Rollouts

LATE = ("chunk", "late")
Late = Callable[..., StudentLosses]


@contextmanager
def passes_once(tracer: Tracer) -> Iterator[None]:
    """Run each kind of pass once while entered."""
    original, late, seen = chunks.velocities, GRADIENTS[LATE], dict[Hashable, Pass]()

    def velocities(
        model: Any,
        latents: Tensor,
        level: Tensor,
        views: Sequence[Conditions],
        shards: Sequence[Any],
    ) -> list[Tensor]:
        given = (model, latents, level, views, shards)
        if torch.is_grad_enabled():
            return original(*given)
        inputs = (id(model), tracer.phase, latents.shape, latents.dtype)
        streams = [one for one in shards if isinstance(one, StreamingSequence)]
        known = [range(len(one._state.calls)) for one in streams]
        pasts = map(past_kinds, streams, known)
        key = (*inputs, *map(shapes_of, views), *map(clip_kind, shards), *pasts)
        before = seen.get(key)
        if before is None or not before.known:
            with tracer.noting() as repeat:
                out = original(*given)
            kept = [pasts_of(one, range(one._calls.made)) for one in streams]
            seen[key] = Pass(repeat, [], all_sizes(out), kept)
            return out
        tracer.repeat(before.repeat)
        with tracer.times(0):
            stores = Stores([], [])
            for one, calls in zip(streams, before.remembered, strict=True):
                assert calls is not None, "known"
                one._kept += pasts_anew(one, range(len(calls)), calls, stores)
            made: list[Tensor] = stores.all_anew(before.returned)
            return made

    with ExitStack() as undo:
        for module in (chunks, windows):
            undo.callback(setattr, module, "velocities", module.velocities)
            module.velocities = velocities  # type: ignore[attr-defined]
        undo.callback(GRADIENTS.__setitem__, LATE, late)
        GRADIENTS[LATE] = chunks_once(late, tracer)
        yield


def chunks_once(late: Late, tracer: Tracer) -> Late:
    """Return the gradients of a student's chunks, each kind of chunk taken once."""

    def once(
        networks: Mapping[str, WorldModel],
        clips: Clips,
        turn: RoleTurn,
        made: Rollouts,
        found: Judged,
        g: Tensor,
    ) -> StudentLosses:
        of, exits = made.share.of, made.exits
        groups = [exits[first : first + of] for first in range(0, len(exits), of)]
        if turn.distill.isg or any(one.history is None for one in exits):
            return late(networks, clips, turn, made, found, g)
        # the last one stays alone, as it reduces gradients
        kinds = [
            (chunk_kind(group[min(made.share.turn, len(group) - 1)]), group is groups[-1])
            for group in groups
        ]
        counts, taken = Counter(kinds), [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        fewer = replace(made, exits=[one for place in taken for one in groups[place]])
        losses = late(networks, clips, turn, fewer, found, g)
        times = [counts[kinds[place]] for place in taken]
        pieces = counted(losses.pieces, times, tracer, made)
        return replace(losses, pieces=pieces)

    return once


def counted(pieces: Any, times: Sequence[int], tracer: Tracer, made: Rollouts) -> Iterator[Tensor]:
    """Yield losses, and count each with its backward pass, which the caller takes before it asks
    for the next, as often as `times` says.

    made: the rollouts, which the losses of all chunks keep alive to the end.
    """
    losses = iter(pieces)
    for count in times:
        with tracer.noting() as seen:
            yield next(losses)
        for _ in range(count - 1):
            tracer.repeat(seen)


def shapes_of(view: Conditions) -> Hashable:
    """Return the shapes of conditions."""
    return tuple((name, tuple(x.shape)) for name, x in sorted(view.fields.items()))


def chunk_kind(chunk: ChunkExit) -> Hashable:
    """Return what the work of a chunk's gradient depends on."""
    assert chunk.history is not None, "the caller looks"
    return (tuple(chunk.noisy.shape), chunk.chunk.start == 0, state_kind(chunk.history))


def state_kind(state: StreamState) -> Hashable:
    """Return the shapes of a past."""
    return tuple(map(past_kind, state.calls))
