"""OrthoRoPE: against its formula, and what a rotary position must keep."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from wm_train.kernels.gdn.reference import rotate
from wm_train.models.waypoint.rope import ortho_rope

DIM, GRID = 64, (4, 6)  # of the released heads; rows and columns


def rotated(x: torch.Tensor, positions: torch.Tensor, grid=GRID) -> torch.Tensor:
    return rotate(x, *ortho_rope(positions, grid, x.shape[-1], torch.float64))


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 3, 24, 1, DIM, generator=g, dtype=torch.float64)


def test_it_is_the_formula(formulas, vectors):
    positions = torch.tensor([[0, 7, 500]])
    expected = formulas.turn(vectors[0], positions, *GRID)
    torch.testing.assert_close(rotated(vectors[0], positions), expected, rtol=1e-12, atol=1e-12)


def test_lengths_stay_and_every_channel_turns(vectors):
    x = vectors[0]
    out = rotated(x, torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    assert bool(((out - x).abs().amax(dim=(0, 1, 2, 3)) > 1e-6).all())  # all 64, not half of them


def test_scores_depend_on_the_distance_in_time_only(vectors):
    q, k = vectors
    near = rotated(q, torch.tensor([[9, 10, 11]])), rotated(k, torch.tensor([[3, 0, 2]]))
    far = rotated(q, torch.tensor([[109, 110, 111]])), rotated(k, torch.tensor([[103, 100, 102]]))
    scores = [(a * b).sum(-1) for a, b in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-11, atol=1e-11)


def test_scores_depend_on_the_distance_between_cells_only(vectors):
    """One query and one key in every cell of three frames: equal steps along columns, rows and
    time give equal scores, and other steps other scores."""
    q, k = (x[0, 0, 0].expand(1, 3, 24, 1, DIM) for x in vectors)
    turned = [rotated(x, torch.tensor([[4, 5, 6]])).reshape(3, *GRID, DIM) for x in (q, k)]
    scores = torch.einsum("tyxd,TYXd->tyxTYX", *turned)
    t, y, x = torch.meshgrid(*map(torch.arange, (3, *GRID)), indexing="ij")
    steps = [at[:, :, :, None, None, None] - at for at in (t, y, x)]
    step = (steps[0] * 100 + steps[1]) * 100 + steps[2]
    means = []
    for one in step.unique():
        own = scores[step == one]
        assert float(own.max() - own.min()) < 1e-10
        means.append(float(own.mean()))
    assert len(means) == 5 * 7 * 11
    assert min(b - a for a, b in pairwise(sorted(means))) > 0


def test_each_axis_has_channels_of_its_own():
    """16 of the 64 channels for the columns, 16 for the rows, 32 for time, and no channel of
    two."""
    table = ortho_rope(torch.tensor([[0, 1]]), GRID, DIM, torch.float64)
    angle = torch.atan2(table.sin, table.cos).reshape(2, *GRID, DIM // 2)
    moves = [(angle.diff(dim=axis).abs() > 1e-9).flatten(0, 2).any(0) for axis in (2, 1, 0)]
    assert [int(moved.sum()) for moved in moves] == [8, 8, 16]  # pairs
    assert torch.equal(sum(moved.int() for moved in moves), torch.ones(32, dtype=torch.int32))


@pytest.mark.parametrize("grid", [(16, 32), (8, 16), (9, 6)])
def test_the_largest_step_between_cells_is_below_half_a_turn(grid):
    """0.8 pi per cell of the shorter axis: neighbours are told apart, at both picture sizes."""
    table = ortho_rope(torch.zeros(1, 1), grid, DIM, torch.float64)
    cells = torch.complex(table.cos, table.sin).reshape(*grid, DIM // 2)
    steps = [
        float((cells[:, 1:] * cells[:, :-1].conj()).angle().abs().max()),
        float((cells[1:] * cells[:-1].conj()).angle().abs().max()),
    ]
    assert max(steps) == pytest.approx(0.8 * math.pi, rel=1e-9)
    ratio = min(grid) / max(grid)
    assert min(steps) == pytest.approx(0.8 * math.pi * ratio, rel=1e-9)
