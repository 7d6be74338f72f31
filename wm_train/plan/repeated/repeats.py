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
from functools import partial
from typing import Any

from torch import Tensor

from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.student_rollouts import GRADIENTS, StudentLosses
from wm_train.plan.repeated.blocks_once import Kinds
from wm_train.plan.repeated.passes import past_kind
from wm_train.plan.tracing import Tracer
from wm_train.sampling import chunks, packed, windows
from wm_train.sampling.chunks import ChunkExit, Rollouts

LATE = ("chunk", "late")
Late = Callable[..., StudentLosses]


@contextmanager
def passes_once(tracer: Tracer) -> Iterator[None]:
    """Run each kind of pass once while entered."""
    original, late, kinds = chunks.velocities, GRADIENTS[LATE], Kinds(tracer)

    def velocities(model: Any, *given: Any) -> list[Tensor]:
        made: list[Tensor] = kinds.once(partial(original, model), id(model))(*given)
        return made

    with ExitStack() as undo:
        for module in (chunks, packed, windows):
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
        *scores: Any,
    ) -> StudentLosses:
        of, exits = made.share.of, made.exits
        groups = [exits[first : first + of] for first in range(0, len(exits), of)]
        if turn.distill.isg or any(one.history is None for one in exits):
            return late(networks, clips, turn, made, *scores)
        # the last one stays alone, as it reduces gradients
        kinds = [
            (chunk_kind(group[min(made.share.turn, len(group) - 1)]), group is groups[-1])
            for group in groups
        ]
        counts, taken = Counter(kinds), [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        fewer = replace(made, exits=[one for place in taken for one in groups[place]])
        losses = late(networks, clips, turn, fewer, *scores)
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


def chunk_kind(chunk: ChunkExit) -> Hashable:
    """Return what the work of a chunk's gradient depends on."""
    assert chunk.history is not None, "the caller looks"
    return (
        tuple(chunk.noisy.shape),
        chunk.chunk.start == 0,
        tuple(map(past_kind, chunk.history.calls)),
    )
