"""Recompute activations in backward without repeating collectives.

A checkpointed block runs twice: once without keeping its activations, and again in backward. The
second run must not communicate: that would double the traffic, and virtual ranks cannot wait for
each other inside backward. So the first run records what its collectives returned, and the second
run reads the record. Recorded per block and rank: the gathered composites and halo frames (small),
and for softmax attention its all-to-all and ring results. A streaming view counts its verb calls;
the second run counts from where the first began.

`keep_products` makes it selective: the results of matrix products, convolutions and attention are
kept as well, so the second run repeats only the cheap operations between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from parallel.comm import Communicator, Tape
from parallel.sequence import SequenceShard

aten = torch.ops.aten
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class _Using:
    """Record the communicator's answers while entered, or replay them from the first one on."""

    def __init__(self, comm: Communicator, answers: list[Any], replaying: bool) -> None:
        self.comm, self.answers, self.replaying = comm, answers, replaying
        self.previous: Tape | None = None

    def __enter__(self) -> None:
        self.previous, self.comm.tape = self.comm.tape, Tape(self.answers, self.replaying)

    def __exit__(self, *error: object) -> None:
        self.comm.tape = self.previous


class _Both(ExitStack):
    """Enter several contexts in order."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> _Both:
        for context in self.contexts:
            self.enter_context(context)
        return self


def checkpoint(
    function: Callable[..., Any], *args: Any, sequence: SequenceShard, keep_products: bool = False
) -> Any:
    """Run `function(*args)` now, and again in backward instead of keeping its activations.

    `function` may call the verbs of `sequence`: their collectives run once and are replayed.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        answers: list[Any] = []
        rewound = sequence.rewind()
        first, again = _Using(sequence.comm, answers, False), _Using(sequence.comm, answers, True)
        if not keep_products:
            return first, _Both(rewound, again)
        keeping, giving = create_selective_checkpoint_contexts(PRODUCTS)
        return _Both(first, keeping), _Both(rewound, again, giving)

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
