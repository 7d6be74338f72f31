"""Where low precision must not reach."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """fp32, or fp64 for a model in fp64."""
    return x if x.dtype == torch.float64 else x.float()
