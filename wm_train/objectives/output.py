"""What an objective gets and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TrainingBatch(Protocol):
    """The part of a batch every objective needs; `data_shards.loading.load.Batch` is one."""

    @property
    def latents(self) -> Tensor:
        """Normalised latents of the local frames, fp32 [B, t, C, h, w]."""

    @property
    def draws(self) -> Tensor:
        """Position of each clip in the stage's global sample stream, int64 [B]; all randomness is
        keyed by it."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """loss: one number per clip, [B], the mean over the whole clip and the same for all holders of
    it; metrics: name -> [B]."""

    loss: Tensor
    metrics: Mapping[str, Tensor]
