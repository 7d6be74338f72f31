"""Step rules against closed forms: data N(0, s^2), whose exact velocity is linear in x."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from wm_train.noise import NoiseKey, normal
from wm_train.sampling.steps import denoise

LEVELS, S = (1.0, 0.9, 0.75, 0.3, 0.0), 0.5  # Waypoint-1.5's levels
CLIPS, FRAMES, SHAPE = 64, 4, (4, 16, 16)


def exact(latents, level, sigma):
    """The velocity of data N(0, s^2): (sigma - a s^2) x / (a^2 s^2 + sigma^2), a = 1 - sigma."""
    a = 1.0 - sigma
    return (sigma - a * S**2) / (a**2 * S**2 + sigma**2) * latents


def euler_deviation(levels) -> float:
    """Every step multiplies the sample by 1 + (sigma' - sigma) dv/dx."""
    one = torch.ones(())
    return float(math.prod(1 + (b - a) * exact(one, None, a) for a, b in pairwise(levels)))


def renoise_deviation(levels) -> float:
    """Var <- sigma'^2 + (1 - sigma')^2 c^2 Var, c = a s^2 / (a^2 s^2 + sigma^2)."""
    variance = 1.0
    for sigma, following in pairwise(levels):
        a = 1 - sigma
        c = a * S**2 / (a**2 * S**2 + sigma**2)
        variance = following**2 + (1 - following) ** 2 * c**2 * variance
    return math.sqrt(variance)


def run(sampler: str, levels=LEVELS, velocity=exact, exit=None):
    key, draws = NoiseKey(3, "steps"), torch.arange(CLIPS)
    noise = normal(key, "rollout", draws, (0, FRAMES), SHAPE)
    clean = (torch.arange(FRAMES) == 0)[None].expand(CLIPS, FRAMES)
    given = torch.full_like(noise, 7.0)

    def fresh(step):
        return normal(key, f"rollout/step{step}", draws, (0, FRAMES), SHAPE)

    return denoise(velocity, noise, clean, given, levels, sampler=sampler, fresh=fresh, exit=exit)


@pytest.mark.parametrize(
    ("sampler", "deviation", "figure"),
    [("euler", euler_deviation, 0.2889), ("renoise", renoise_deviation, 0.2514)],
)
def test_samples_have_the_standard_deviation_of_the_closed_form(sampler, deviation, figure):
    """196,608 samples: the standard error of their deviation is 0.16 %."""
    assert deviation(LEVELS) == pytest.approx(figure, abs=5e-5)
    made = run(sampler).clean
    assert float(made[:, 1:].std()) == pytest.approx(deviation(LEVELS), rel=6e-3)
    assert (made[:, 0] == 7.0).all()


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
@pytest.mark.parametrize("exit", [1, 2, 4])
def test_an_exit_stops_the_same_steps_earlier(sampler, exit):
    calls = []

    def counted(latents, level, sigma):
        calls.append((latents.clone(), level.clone(), sigma))
        return exact(latents, level, sigma)

    run(sampler, velocity=counted)
    whole, calls = calls, []
    found = run(sampler, velocity=counted, exit=exit)
    assert len(calls) == exit
    assert found.sigma == LEVELS[exit - 1]
    assert torch.equal(found.noisy, whole[exit - 1][0])
    assert torch.equal(found.level, whole[exit - 1][1])
    assert (found.level[:, 0] == 0).all()
    assert (found.level[:, 1:] == torch.tensor(found.sigma)).all()
    a, sigma = 1 - found.sigma, found.sigma
    clean = a * S**2 / (a**2 * S**2 + sigma**2) * found.noisy  # E[x0 | x]
    assert (found.clean - clean)[:, 1:].abs().max() <= 1e-6
    assert (found.clean[:, 0] == 7.0).all()


def test_every_step_of_renoise_has_noise_of_its_own():
    seen = []

    def nothing(latents, level, sigma):
        seen.append(latents[:, 1:].flatten())
        return latents / sigma  # x0 = 0: what is left is the step's noise

    run("renoise", velocity=nothing)
    parts = torch.stack([x / sigma for x, sigma in zip(seen, LEVELS)])
    correlation = torch.corrcoef(parts)
    assert (correlation - torch.eye(4)).abs().max() <= 0.01  # 4.5 standard errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "heun"}, "expected one of euler, renoise"),
        ({"sampler": "euler", "exit": 5}, "expected 1 to 4"),
        ({"sampler": "euler", "exit": 0}, "expected 1 to 4"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)
