"""Statistics of rollouts on clips whose faults are known."""

from __future__ import annotations

import pytest
import torch

from wm_train.config.roles import DistillConfig
from wm_train.evaluation.rollout_statistics import clip_statistics, gate_problem

STARTS = (0, 4, 7)


def clips(seed: int, speed: float = 1.0) -> torch.Tensor:
    """Return [8, 10, 3, 6, 6], random walks in time around 0."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(8, 10, 3, 6, 6, generator=generator)
    return steps[:, :1] * 3 + speed * steps.cumsum(1)


def figures(made, again=None, truth=None) -> dict[str, float]:
    again = made if again is None else again
    return clip_statistics(made, again, clips(0) if truth is None else truth, STARTS)


def test_the_data_itself_is_at_one():
    found = figures(clips(0), clips(1))
    assert found["std_ratio"] == pytest.approx(1)
    assert found["motion_ratio"] == pytest.approx(1)
    assert found["drift"] == pytest.approx(1)
    assert found["mean_shift"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"] == pytest.approx(1, abs=0.1)


def test_each_fault_shows_in_its_own_figure():
    truth = clips(0)
    assert figures(2 * truth)["std_ratio"] == pytest.approx(2)
    assert figures(truth)["diversity"] == 0
    std = truth[:, 1:].transpose(0, 2).flatten(1).std(dim=1)
    shifted = truth + 0.5 * std[:, None, None]
    assert figures(shifted)["mean_shift"] == pytest.approx(0.5, rel=1e-3)
    assert figures(shifted)["std_ratio"] == pytest.approx(1, rel=1e-5)
    frozen = truth[:, :1].expand_as(truth)
    assert figures(frozen)["motion_ratio"] < 1e-6
    middle = truth[:, 1:].mean(dim=1, keepdim=True)
    slow = torch.cat([truth[:, :1], middle + 0.5 * (truth[:, 1:] - middle)], dim=1)
    assert figures(slow)["motion_ratio"] < 0.9
    grown = truth.clone()
    grown[:, 7:] *= 3
    assert figures(grown)["drift"] == pytest.approx(3, rel=1e-5)


def test_the_given_first_frame_does_not_count():
    truth, other = clips(0), clips(0)
    other[:, 0] = 100.0
    found, same = figures(other), figures(truth)
    assert found["std_ratio"] == pytest.approx(same["std_ratio"])
    assert found["mean_shift"] == pytest.approx(same["mean_shift"], abs=1e-6)


def test_the_gate_names_figure_bounds_and_key():
    bounds = DistillConfig((1.0, 0.5), gate_std=(0.5, 2.0), gate_motion=(0.25, 4.0))
    assert not gate_problem({"rollout/std_ratio": 0.6, "rollout/motion_ratio": 3.9}, bounds)
    text = gate_problem({"rollout/std_ratio": 2.5, "rollout/motion_ratio": 0.1}, bounds)
    assert "std_ratio 2.5, expected 0.5 to 2 (key distill.gate_std)" in text
    assert "motion_ratio 0.1, expected 0.25 to 4 (key distill.gate_motion)" in text
