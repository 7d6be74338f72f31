"""Run each kind of pass without gradients once, of a block, of a network or of attention's kernels,
and count the others.

What those return and remember is made anew by shape, and their work is counted again
(`Tracer.repeat`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from parallel.reference import Kernels
from wm_train.models.spec import WorldModel
from wm_train.plan.repeated.passes import (
    Pass,
    Remembering,
    Stores,
    all_sizes,
    calls_made,
    described,
    past_kinds,
    pasts_of,
    remember_anew,
    sizes,
    unit_kind,
)
from wm_train.plan.tracing import Tracer


@contextmanager
def blocks_once(tracer: Tracer, models: Iterable[WorldModel]) -> Iterator[None]:
    """Run each kind of block of these models once while entered, but where gradients are taken."""
    kinds = Kinds(tracer)
    with ExitStack() as undo:
        for unit in {unit: None for model in models for unit in model.units()}:
            undo.callback(unit.__dict__.pop, "forward")
            unit.forward = kinds.once(unit.forward, unit_kind(unit))  # type: ignore[method-assign]
        yield


def attention_once(kernels: Kernels, tracer: Tracer) -> Kernels:
    """Return the table with an attention that computes each kind of block once: blocks of a model
    see the same tiles again and again, also where gradients are taken."""
    kinds = Kinds(tracer)

    def once(name: str) -> Callable[..., Any]:
        kernel = getattr(kernels, name)

        def run(*given: Any) -> Any:
            *tensors, tiles = given
            return kinds.once(lambda *own: kernel(*own, tiles), (name, tiles))(*tensors)

        return run

    return kernels._replace(
        block_attention=once("block_attention"),
        block_attention_backward=once("block_attention_backward"),
    )


class Kinds:
    """Hold the passes that have run, by kind."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._counts: dict[Hashable, list[int]] = {}  # calls of each stream
        self._seen: dict[Hashable, Pass] = {}

    def once(self, forward: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
        """Return a function that runs `forward` if none of its kind has run on arguments alike.

        kind: what its work depends on, besides its arguments.
        """

        def run(*args: Any) -> Any:
            if torch.is_grad_enabled():
                return forward(*args)
            tensors: list[Tensor] = []
            streams: list[Remembering] = []
            try:
                shapes = (kind, self._tracer.phase, described(args, tensors, streams))
            except TypeError:  # an argument that cannot be compared
                return forward(*args)
            starts = [*map(calls_made, streams)]
            if shapes in self._counts:
                spans = _spans(starts, self._counts[shapes])
                before = self._seen.get((shapes, *map(past_kinds, streams, spans)))
                if before and before.known:
                    return self._repeat(before, tensors, streams, spans)
            with self._tracer.noting() as repeat:
                out = forward(*args)
            counts = [calls_made(one) - start for one, start in zip(streams, starts, strict=True)]
            spans = _spans(starts, counts)
            kept = [*map(pasts_of, streams, spans)]
            self._counts[shapes] = counts
            self._seen[(shapes, *map(past_kinds, streams, spans))] = Pass(
                repeat, [*map(sizes, tensors)], all_sizes(out), kept
            )
            return out

        return run

    def _repeat(
        self, before: Pass, tensors: list[Tensor], streams: list[Remembering], spans: list[range]
    ) -> Any:
        """Count a pass once more, and return and remember what it would."""
        self._tracer.repeat(before.repeat)
        with self._tracer.times(0):
            stores = Stores(before.inputs, tensors)
            for one, span, calls in zip(streams, spans, before.remembered, strict=True):
                assert calls is not None, "known"
                remember_anew(one, span, calls, stores)
            return stores.all_anew(before.returned)


def _spans(starts: list[int], counts: list[int]) -> list[range]:
    return [range(start, start + n) for start, n in zip(starts, counts, strict=True)]
