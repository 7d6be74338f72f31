"""Compute rotary position embedding over (time, height, width), as cosines and sines per
interleaved pair of channels.

Source: Wan2.1's three-axis split as the public SANA-WM uses it. Of D/2 pairs, height and width take
D//6 each, time the rest. The camera branch rotates only the second half of its channels and takes
the leading frequencies of each axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rotary(NamedTuple):
    """Hold cosines and sines per token and pair, each fp32 [B, t, S, 1, pairs]."""

    cos: Tensor
    sin: Tensor


def axis_pairs(dim: int) -> tuple[int, int, int]:
    """Return the pairs of channels given to time, height and width among `dim` channels."""
    space = dim // 6
    return dim // 2 - 2 * space, space, space


def rotary_tables(
    positions: Tensor, grid: tuple[int, int], head_dim: int, used_dim: int | None = None
) -> Rotary:
    """Compute the angles of every token: positions [B, t] -> cos and sin [B, t, S, 1, used_dim //
    2].

    used_dim < head_dim keeps the leading frequencies of each axis of the head_dim table (camera
    branch).
    """
    height, width = grid
    b, t = positions.shape
    index = [
        positions.float()[:, :, None, None],
        torch.arange(height, device=positions.device, dtype=torch.float32)[None, None, :, None],
        torch.arange(width, device=positions.device, dtype=torch.float32)[None, None, None, :],
    ]
    angles = []
    for axis, (pairs, used) in enumerate(
        zip(axis_pairs(head_dim), axis_pairs(used_dim or head_dim))
    ):
        exponent = torch.arange(0, 2 * pairs, 2, device=positions.device, dtype=torch.float32) / (
            2 * pairs
        )
        frequency = (1.0 / THETA**exponent)[:used]
        angles.append((index[axis][..., None] * frequency).expand(b, t, height, width, used))
    angle = torch.cat(angles, dim=-1).reshape(
        b, t, height * width, 1, sum(axis_pairs(used_dim or head_dim))
    )
    return Rotary(angle.cos(), angle.sin())
