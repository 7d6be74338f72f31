"""Activation checkpointing that knows of collectives.

A checkpointed block runs twice: now without keeping its activations, and again in backward. The second run must not communicate again: it
would double the traffic, and virtual ranks cannot meet inside backward. So the first run keeps what its collectives returned and the second
one reads that. Kept per block and member: the gathered composites and halo frames (small), and for softmax attention its all-to-all and
ring results.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from parallel.comm import Communicator, Tape
from parallel.sequence import SequenceShard


class _Using:
    """While entered, the communicator records its answers, or replays them from the first one on."""

    def __init__(self, comm: Communicator, answers: list[Any], replaying: bool) -> None:
        self.comm, self.answers, self.replaying = comm, answers, replaying
        self.previous: Tape | None = None

    def __enter__(self) -> None:
        self.previous, self.comm.tape = self.comm.tape, Tape(self.answers, self.replaying)

    def __exit__(self, *error: object) -> None:
        self.comm.tape = self.previous


def checkpoint(function: Callable[..., Any], *args: Any, sequence: SequenceShard) -> Any:
    """`function(*args)` now, and once more in backward instead of keeping its activations. `function` may call the verbs of `sequence`."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        answers: list[Any] = []
        return _Using(sequence.comm, answers, False), _Using(sequence.comm, answers, True)

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
