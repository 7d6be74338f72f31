"""Compute OrthoRoPE: rotary positions over columns, rows and time, each on channels of its own.

Of a head's D/2 channel pairs an eighth of D belongs to the columns, as many to the rows and a
quarter of D to time (Waypoint-1.5 §2.5; its "8 per spatial axis, 16 temporal" are pairs). Rows and
columns are cell centres in (-1, 1), so a model for 128 tokens a frame runs at 512; their
frequencies end at 0.8 of the grid's Nyquist frequency.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wm_train.models.layers.rotary import Rotary

THETA = 10000.0
NYQUIST = 0.8  # share of the highest frequency that the shorter side of the grid can tell apart


def ortho_rope(
    positions: Tensor, grid: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.float32
) -> Rotary:
    """Compute cosines and sines of every token, [B, t, S, 1, head_dim // 2] of type `dtype`.

    positions: time index of each frame in its document, [B, t]; grid: rows and columns of tokens.
    """
    (rows, columns), (b, t), device = grid, positions.shape, positions.device
    space, time = head_dim // 8, head_dim // 4  # pairs
    highest = NYQUIST * min(rows, columns) / 2
    count = (space + 1) // 2
    frequencies = math.pi * torch.linspace(1.0, highest, count, dtype=dtype, device=device)
    frequencies = frequencies.repeat_interleave(2)[:space]
    exponents = torch.arange(0, time, 2, dtype=dtype, device=device) / time
    steps = (THETA**-exponents).repeat_interleave(2)
    across, down = (
        (2 * torch.arange(cells, dtype=dtype, device=device) + 1) / cells - 1
        for cells in (columns, rows)
    )
    angles = (
        (across[:, None] * frequencies).expand(b, t, rows, columns, space),
        (down[:, None, None] * frequencies).expand(b, t, rows, columns, space),
        (positions.to(dtype)[:, :, None, None, None] * steps).expand(b, t, rows, columns, time),
    )
    angle = torch.cat(angles, dim=-1).reshape(b, t, rows * columns, 1, head_dim // 2)
    return Rotary(angle.cos(), angle.sin())
