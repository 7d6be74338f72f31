"""Average the weights exponentially, sharded exactly as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from wm_train.boxes import local_tensor


def ema_start(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a copy of the local shard of every trainable weight, by name."""
    return {name: weights[name].clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def ema_update(
    ema: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], decay: float, step: int
) -> None:
    """Update ema <- d * ema + (1 - d) * weight with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of early steps lets the average forget the random start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    # element-wise, so on local shards: DTensor would cost more than the update
    torch._foreach_lerp_(
        [local_tensor(average) for average in ema.values()],
        [local_tensor(weights[name]) for name in ema],
        1 - decay,
    )


@contextmanager
def ema_weights(
    ema: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    publish: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Replace the weights by their average inside this context, and restore them after it.

    They are restored after an error as well. publish: called after each change.
    """
    own = {name: weights[name].clone() for name in ema}

    def become(values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                weights[name].copy_(value)
        if publish:
            publish()

    become(ema)
    try:
        yield
    finally:
        become(own)
