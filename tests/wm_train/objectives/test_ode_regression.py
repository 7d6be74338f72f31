"""Regression on a teacher's trajectories: its inputs and targets, and its closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.clips import Clips
from wm_train.objectives.config import OdeRegressionConfig
from wm_train.objectives.ode_regression import START, ode_regression

CONFIG = OdeRegressionConfig(levels=(1.0, 0.75, 0.4))
LAYOUT = ClipLayout(7, chunk_starts=(0, 4))
MU, SPREAD = 0.7, 0.5  # of Gaussian data


def flow(x, sigma: float):
    """Return the end of the exact flow of N(MU, SPREAD^2) through x at sigma."""
    a = 1 - sigma
    return MU + SPREAD * (x - a * MU) / (a**2 * SPREAD**2 + sigma**2) ** 0.5


def state(noise, sigma: float):
    """Return the state at sigma of the same trajectory that starts with this noise at 1."""
    a = 1 - sigma
    return a * MU + (a**2 * SPREAD**2 + sigma**2) ** 0.5 * noise


def clips(count: int = 64) -> Clips:
    """Return clips whose `ode` are exact trajectories from their own keyed noise."""
    numbers = torch.arange(count) + 2**40
    own = torch.stack([(numbers >> 8 * i) & 255 for i in range(8)], dim=1)
    noise = normal(START, "start", numbers, (0, 7), (3, 2, 2))
    ode = torch.stack([state(noise, 0.75), state(noise, 0.4), flow(noise, 1.0)], dim=2)
    conditions = Conditions((32, 32), 8, {"ode": ode, "ode_start": own})
    sequence = LocalSequence(LAYOUT)
    latents = torch.full((count, 7, 3, 2, 2), torch.nan)  # of the data, which are not used
    return Clips(latents, torch.arange(count), conditions, sequence, NoiseKey(1, "ode"))


def broadcast(sigma):
    return sigma[:, :, None, None, None]


def test_the_flow_map_reaches_zero_and_a_velocity_model_does_not():
    def flow_map(x, sigma, conditions, sequence):
        s = broadcast(sigma.double())
        a = 1 - s
        end = MU + SPREAD * (x - a * MU) / (a**2 * SPREAD**2 + s**2).sqrt()
        return torch.where(s > 0, (x - end) / s.clamp(min=1e-9), 0.0)

    def velocity(x, sigma, conditions, sequence):
        s = broadcast(sigma.double())
        a = 1 - s
        return -MU + (s - a * SPREAD**2) / (a**2 * SPREAD**2 + s**2) * (x - a * MU)

    data = clips()
    assert ode_regression(flow_map, data, CONFIG).loss.max() < 1e-12
    loss = ode_regression(velocity, data, replace(CONFIG, levels=CONFIG.levels)).loss
    assert loss.mean() > 1e-3
    # at sigma 1 the velocity model predicts the mean: its error is the data's variance
    first = ode_regression(lambda x, s, c, q: x - MU, data, CONFIG)
    assert first.loss.mean() > 0.05


def test_every_chunk_draws_all_states_and_the_first_frame_is_clean():
    seen = {}

    def model(x, sigma, conditions, sequence):
        seen.update(x=x, sigma=sigma)
        return torch.zeros_like(x)

    data = clips(400)
    loss = ode_regression(model, data, CONFIG).loss
    x, sigma, ode = seen["x"], seen["sigma"], data.conditions.fields["ode"]
    assert sigma[:, 0].abs().max() == 0
    assert torch.equal(x[:, 0], ode[:, 0, -1])
    assert torch.equal(sigma[:, 4:], sigma[:, 4:5].expand(400, 3))
    assert torch.equal(sigma[:, 1:4], sigma[:, 1:2].expand(400, 3))
    counts = [int((sigma[:, 4] == level).sum()) for level in (1.0, 0.75, 0.4, 0.0)]
    assert sum(counts) == 400
    assert min(counts) > 60
    numbers = torch.arange(400) + 2**40
    noise = normal(START, "start", numbers, (0, 7), (3, 2, 2))
    for level, expected in ((1.0, noise), (0.75, ode[:, :, 0]), (0.4, ode[:, :, 1])):
        chosen = sigma == level
        assert torch.equal(x[chosen], expected[chosen])
    weight = (sigma > 0).float()
    error = (x - ode[:, :, -1]).square().mean((2, 3, 4))
    expected = (error * weight).sum(1) / weight.sum(1).clamp(min=1)
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_the_loss_does_not_depend_on_how_frames_are_split():
    data = clips(4)
    whole = ode_regression(lambda x, s, c, q: 0.3 * x, data, CONFIG).loss

    def one(comm):
        sequence = GroupSequence(LAYOUT, comm)
        frames = slice(sequence.frames.start, sequence.frames.stop)
        fields = {**data.conditions.fields, "ode": data.conditions.fields["ode"][:, frames]}
        part = replace(
            data,
            latents=data.latents[:, frames],
            sequence=sequence,
            conditions=replace(data.conditions, fields=fields),
        )
        return ode_regression(lambda x, s, c, q: 0.3 * x, part, CONFIG).loss

    for loss in run_virtual(one, ring=2)[0]:
        assert torch.allclose(loss, whole, rtol=1e-6)


def test_clips_without_trajectories_are_refused():
    data = clips(2)
    bare = replace(data, conditions=Conditions((32, 32), 8))
    with pytest.raises(ValueError, match="no trajectories, expected members ode and ode_start"):
        ode_regression(lambda x, s, c, q: x, bare, CONFIG)
    with pytest.raises(ValueError, match="got clips with 3 states, expected"):
        ode_regression(lambda x, s, c, q: x, data, OdeRegressionConfig())
