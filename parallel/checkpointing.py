"""Activation checkpointing that knows of collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from parallel.sequence import SequenceShard


def checkpoint(function: Callable[..., Any], *args: Any, sequence: SequenceShard) -> Any:
    """Like `torch.utils.checkpoint.checkpoint`: `function(*args)` now, and once more in backward instead of keeping its activations."""
    return torch_checkpoint(function, *args, use_reentrant=False)
