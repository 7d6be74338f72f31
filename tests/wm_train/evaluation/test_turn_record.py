"""The figures of turns by noise level, over the teacher's floor, and their picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.evaluation.rollout_statistics import clipped_luma, over_floor
from wm_train.evaluation.turn_record import INKS, turns_picture
from wm_train.objectives.score_levels import MIDDLES, by_level, mean_at_levels


def test_errors_are_sorted_by_noise_level_and_add_up():
    """Frames at levels of their own; a given one and one without a loss do not count."""
    level = torch.tensor([[0.0, 0.15, 0.19, 0.98], [0.0, 0.45, 1.0, 0.45]])
    weight = (level > 0).float() * torch.tensor([1.0, 1.0, 1.0, 0.0])
    error = torch.tensor([[9.0, 1.0, 3.0, 9.0], [9.0, 5.0, 7.0, 9.0]])
    mean = LocalSequence(ClipLayout(4)).mean
    found = by_level(level, weight, mean, error)
    figures = mean_at_levels({name: float(value.mean()) for name, value in found.items()})
    losses = {name: x for name, x in figures.items() if name.startswith("loss_at")}
    assert losses == pytest.approx(
        {"loss_at_sigma_0.1": 2.0, "loss_at_sigma_0.5": 5.0, "loss_at_sigma_0.9": 7.0}
    )
    shares = [figures[f"share_at_sigma_{middle}"] for middle in MIDDLES]
    assert shares == pytest.approx([0.5, 0.0, 0.25, 0.0, 0.25])
    assert set(by_level(level, weight, mean)) == {f"share_at_sigma_{x}" for x in MIDDLES}


def test_a_turn_of_the_critic_is_set_against_the_floor_of_its_levels():
    figures = {"critic/loss_at_sigma_0.1": 6.0, "student/loss_at_sigma_0.5": 1.0}
    assert over_floor(figures, {0.1: 2.0, 0.5: 1.0}) == {"critic/over_floor_sigma_0.1": 3.0}
    assert over_floor({"student/loss": 1.0}, {0.1: 2.0}) == {}


def test_black_and_white_pixels_are_counted_by_luma():
    video = np.full((2, 2, 2, 3), 128, np.uint8)
    video[0, 0, 0], video[1, 1, 1] = 255, 0
    video[0, 1, 1] = (255, 0, 0)  # a pure colour is not clipped
    assert clipped_luma([video, np.full((2, 2, 2, 3), 100, np.uint8)]) == pytest.approx(2 / 16)


def test_the_picture_has_a_line_for_each_figure_and_stands_without_any():
    rows = []
    for step in range(1, 61):
        row = {"step": step, "rollout/std_ratio": 1.0} if step % 20 == 0 else {"step": step}
        row |= {f"critic/over_floor_sigma_{x}": 1 + x + step / 60 for x in MIDDLES}
        row |= {f"share_at_sigma_{x}": 0.2 for x in MIDDLES}
        rows.append(row)
    picture = turns_picture(rows)
    corner = picture[:240, :480].reshape(-1, 3)
    for ink in INKS:
        assert (corner == ink).all(axis=1).sum() > 300
    assert turns_picture([{"step": 1}]).shape == picture.shape
