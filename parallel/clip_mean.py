"""Compute the weighted mean over a whole clip, equal on all ranks.

Gradient convention of the whole system: **sum over the sequence group, mean over data.** Every rank
ends with the same loss and starts backward from it with the same upstream gradient. The loss counts
once, so the backward of `mean` gives each rank the gradient of its *own* values only and needs no
collective. The sum of all ranks' parameter gradients is then the gradient of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.comm import AllGather, Member, Program
from parallel.local_attention import accumulation_dtype


@dataclass(frozen=True)
class MeanVerb:
    """Average value [B, T/P, …] with weight of the same shape -> [B]; a row without weight gives 0.

    Sent to each other rank: 2·B elements.
    """

    name = "mean"

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        value, weight = tensors
        assert value is not None
        assert weight is not None
        wide = accumulation_dtype(value.dtype)
        v, w = value.to(wide).flatten(1), weight.to(wide).flatten(1)
        totals = torch.stack([(v * w).sum(1), w.sum(1)])
        if member.size > 1:
            # [2, B] -> the same of every rank; summed in rank order, so that every rank gets
            # the same bits
            gathered = yield AllGather(totals)
            totals = gathered[0].clone()
            for part in gathered[1:]:
                totals += part
        total = torch.where(totals[1] == 0, torch.ones_like(totals[1]), totals[1])
        mean = totals[0] / total
        return (mean,), (value, weight, total, mean.clone()), None

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        value, weight, total, mean = kept
        assert value is not None
        assert weight is not None
        assert total is not None
        assert mean is not None
        if grads[0] is None:
            return None, None
        scale, center = (x.reshape(-1, *[1] * (value.dim() - 1)) for x in (grads[0] / total, mean))
        return (scale * weight).to(value.dtype), (scale * (value - center)).to(weight.dtype)
        yield
