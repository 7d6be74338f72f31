"""Exponential moving average of the weights, sharded exactly as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def ema_start(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every trainable parameter (its local shard, when it is sharded) by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def ema_update(ema: dict[str, torch.Tensor], model: nn.Module, decay: float, step: int) -> None:
    """ema <- d * ema + (1 - d) * weight with d = min(decay, (1 + step) / (10 + step)): the early average forgets the random start."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = dict(model.named_parameters())
    torch._foreach_lerp_(list(ema.values()), [weights[name].detach() for name in ema], 1 - decay)


@contextmanager
def ema_weights(ema: dict[str, torch.Tensor], model: nn.Module) -> Iterator[None]:
    """The model runs on its averaged weights inside this context and gets its own back after, also after an error."""
    weights = dict(model.named_parameters())
    own = {name: weights[name].detach().clone() for name in ema}
    with torch.no_grad():
        for name, average in ema.items():
            weights[name].copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                weights[name].copy_(value)
