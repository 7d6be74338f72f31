"""Compute Wan's rotary tables on the host in fp64: angles in fp32 are off by 1.2e-5 at position 499
and 2.7e-5 at 1023, and accelerators have no fp64 worth the name."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.sequence import SequenceShard
from wm_train.models.layers.rotary import THETA, Rotary, axis_pairs
from wm_train.models.wan.config import MOST_POSITIONS


def check_positions(sequence: SequenceShard, grid: tuple[int, int]) -> None:
    """Raise ValueError for a local frame, a row or a column beyond the released table.

    From the layout's integers, as the planner counts with positions that have no values.
    """
    layout, own = sequence.layout, range(sequence.frames.start, sequence.frames.stop)
    last = max(*(size - 1 for size in grid), *(layout.position_of(i) for i in own))
    if last >= MOST_POSITIONS:
        raise ValueError(
            f"rotary embedding failed: got position {last}, expected at most {MOST_POSITIONS - 1},"
            " the last of Wan's table (frames of the stage). Fix: shorter clips"
        )


def wan_rope(
    positions: Tensor,
    grid: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotary:
    """Compute cosines and sines of every token, [1, t, S, 1, head_dim // 2] of type `dtype`.

    positions: time index of each local frame, int64 [1, t] on the host; grid: rows and columns of
    tokens.
    """
    (rows, columns), t = grid, positions.shape[1]
    indices = (positions[0], torch.arange(rows), torch.arange(columns))
    tables = []
    for index, pairs, shape in zip(
        indices, axis_pairs(head_dim), ((t, 1, 1), (1, rows, 1), (1, 1, columns)), strict=True
    ):
        exponents = torch.arange(pairs, dtype=torch.float64) / pairs
        angle = index.to(torch.float64)[:, None] * THETA**-exponents
        both = torch.stack((angle.cos(), angle.sin())).to(dtype).to(device)  # few: of one axis
        tables.append(both.reshape(2, *shape, pairs).expand(2, t, rows, columns, pairs))
    cos, sin = torch.cat(tables, dim=-1).reshape(2, 1, t, rows * columns, 1, head_dim // 2)
    return Rotary(cos, sin)
