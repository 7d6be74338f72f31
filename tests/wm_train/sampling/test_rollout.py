"""Euler sampling: exact for a straight flow, first frame held, mesh-invariant start."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.conditioning import Conditions
from wm_train.config import registry
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.experts import Experts
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.rollout import rollout
from wm_train.sampling.sample import SampleStart

KEY, CONDITIONS = NoiseKey(0, "first"), Conditions((96, 160), 8)


class StraightFlow(torch.nn.Module):
    """The exact velocity of a flow whose data is one known clip: (x - target) / sigma; remembers
    the noise levels it was asked at."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target, self.levels = target, []

    def forward(self, latents, sigma, conditions, sequence):
        self.levels.append(sigma.clone())
        target = self.target[:, sequence.frames.start : sequence.frames.stop]
        return (latents - target) / sigma.clamp_min(1e-6)[:, :, None, None, None]


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 1.0), (5, 9.95)])
def test_a_straight_flow_is_followed_exactly_and_the_first_frame_is_held(steps, shift):
    target = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    model = StraightFlow(target)
    first = target[:, 0] + 5.0
    draws, sequence = torch.tensor([4, 9]), LocalSequence(ClipLayout(4))
    made = rollout(model, first, CONDITIONS, sampling_levels(steps, shift), KEY, draws, sequence)
    assert torch.equal(made[:, 0], first)
    assert (made[:, 1:] - target[:, 1:]).abs().max() < 1e-5
    assert len(model.levels) == steps
    assert all((level[:, 0] == 0).all() for level in model.levels)
    levels = [float(level[0, 1]) for level in model.levels]
    assert levels[0] == 1.0
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_noise_does_not_depend_on_the_mesh(name):
    """Neither that of the start nor, with `renoise`, that of the steps."""
    still = torch.nn.Module()
    still.forward = lambda latents, sigma, conditions, sequence: torch.zeros_like(latents)
    first, config = torch.zeros(2, 3, 2, 2), registry.config_class("samplers", name)()

    def sampled(sequence, shift=0):
        given = (Experts((0.0,), (still,)), first, CONDITIONS, sampling_levels(2), KEY)
        start = SampleStart(*given, torch.tensor([4, 9]) + shift, sequence, REFERENCE)
        return registry.builder(config)(start, config)

    layout = ClipLayout(5)
    whole = sampled(LocalSequence(layout))
    parts, _ = run_virtual(lambda comm: sampled(GroupSequence(layout, comm)), 1, 3)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(sampled(LocalSequence(layout), 1), whole)
    noise = normal(KEY, "rollout", torch.tensor([4, 9]), (1, 5), (3, 2, 2))
    if name == "renoise":  # x0 = x where the velocity is zero; levels 1, .5
        fresh = normal(KEY, "rollout/step2", torch.tensor([4, 9]), (1, 5), (3, 2, 2))
        noise = 0.5 * noise + 0.5 * fresh
    assert torch.equal(whole[:, 1:], noise)


def test_guidance_pushes_away_from_the_prediction_without_a_camera():
    class Camera(torch.nn.Module):
        def forward(self, latents, sigma, conditions, sequence):
            with_camera = conditions.camera_keep is None or bool(conditions.camera_keep.all())
            return torch.full_like(latents, 1.0 if with_camera else 0.25)

    first, draws, sequence = (
        torch.zeros(1, 1, 1, 1),
        torch.tensor([0]),
        LocalSequence(ClipLayout(3)),
    )
    args = (Camera(), first, CONDITIONS, sampling_levels(4), KEY, draws, sequence)
    plain, guided = rollout(*args), rollout(*args, guidance={"camera": 3.0})
    assert torch.allclose(
        plain[:, 1:] - guided[:, 1:],
        torch.full((1, 2, 1, 1, 1), 0.25 + 3.0 * 0.75 - 1.0),
        atol=1e-6,
    )


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="sample_steps"):
        sampling_levels(0)


def test_levels_given_by_hand_are_those_of_the_same_number_of_steps():
    spaced = sampling_levels(5, 3.0)
    assert spaced[0] == 1.0
    assert spaced[-1] == 0.0
    assert sampling_levels(spaced[:-1], 3.0) == spaced, "taken as they are, without a shift"
    assert sampling_levels([1.0, 0.9, 0.75, 0.3]) == [1.0, 0.9, 0.75, 0.3, 0.0]
