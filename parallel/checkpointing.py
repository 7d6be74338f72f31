"""Recompute activations in backward, with or without repeating collectives.

A checkpointed block runs twice: once without keeping its activations, and again in backward. What
its collectives do the second time is `SequenceShard.recompute`. In units u of one activation of a
rank, [B, T/P, S, C], and with R ring ranks, a block with softmax attention keeps until then:

- answers: what the collectives returned, which the second run reads. 4 u with Ulysses and 2 u for
  each of the R - 1 ring shifts. Composites and halo frames are small.
- keep_attention: of attention its result and what its backward needs (q, k, v, out after the
  all-to-all, and the log-sum-exp), so that it is not computed again: 5 u with Ulysses, 1 u without,
  whatever R is, and the frames that it fetched where it exchanges these alone (`need.py`). Answers
  of other verbs.
- collectives: nothing. The second run communicates again, in the same order on all ranks, as all
  have the same graph.

Under hooks on saved tensors that move them to the host (`parallel.offload_activations`) what is
kept goes there as well.

Virtual ranks cannot wait for each other inside backward and always read answers. A streaming view
counts its verb calls; the second run counts from where the first began.

`keep_products` makes it selective: the results of matrix products, convolutions and attention are
kept as well, so the second run repeats only the cheap operations between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from parallel.comm import Communicator, SavedHooks, Tape
from parallel.compat import saved_tensor_hooks
from parallel.sequence import SequenceShard

WHOLE = frozenset({"attend"})  # verbs that keep_attention does not run again
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

    def __init__(
        self,
        comm: Communicator,
        answers: list[Any],
        replaying: bool,
        whole: frozenset[str],
        hooks: SavedHooks | None,
    ) -> None:
        self.comm, self.answers, self.replaying, self.whole = comm, answers, replaying, whole
        self.hooks = hooks
        self.previous: Tape | None = None

    def __enter__(self) -> None:
        tape = Tape(self.answers, self.replaying, whole=self.whole, hooks=self.hooks)
        self.previous, self.comm.tape = self.comm.tape, tape

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

    `function` may call the verbs of `sequence`, whose `recompute` says what becomes of their
    collectives. Raises ValueError for keep_products with keep_attention: both store attention, and
    the second run would take one's results for the other's.
    """
    comm, mode = sequence.comm, "answers" if sequence.comm.joined else sequence.recompute
    if keep_products and mode == "keep_attention":
        raise ValueError(
            "checkpointing failed: got keep_products with keep_attention, expected one of them (key"
            " parallel.recompute). Fix: parallel.recompute=answers"
        )

    # the caller's, not those of torch_checkpoint, which are there inside
    hooks = None if comm.joined or comm.tape is not None else saved_tensor_hooks()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        answers: list[Any] = []
        rewound, whole = sequence.rewind(), WHOLE if mode == "keep_attention" else frozenset()
        first: AbstractContextManager[Any] = nullcontext()
        again: AbstractContextManager[Any] = nullcontext()
        if mode != "collectives":
            first, again = (_Using(comm, answers, replay, whole, hooks) for replay in (False, True))
        if not keep_products:
            return first, _Both(rewound, again)
        keeping, giving = create_selective_checkpoint_contexts(
            [*PRODUCTS, *sequence.kernels.products]
        )
        return _Both(first, keeping), _Both(rewound, again, giving)

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
