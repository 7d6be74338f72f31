"""Distribution matching against closed forms of Gaussian teachers: its gradient, its end, guidance,
the critic's floor, scopes and given frames."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.objectives.score_difference import critic_loss, score_difference
from wm_train.sampling.guidance import guided, velocities

MU = torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64)
WEIGHTS = ("normalised", "velocity", "score")


def start(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return b and A of a student that is far from the teacher."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return torch.zeros(3, dtype=torch.float64), matrix / 2 + torch.eye(3).double()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_critics_floor_is_the_trace_of_the_closed_form(gaussians, sigma):
    """E |v - (eps - x)|^2 of the best network is tr[S L^-1]; over quadratic points it is exact."""
    covariance = gaussians.covariance_of(3, 0)
    z, noise = gaussians.cubature(3)
    clean = z @ torch.linalg.cholesky(covariance).T + MU
    lam = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(3).double()
    floor = float(torch.trace(covariance @ torch.linalg.inv(lam))) / 3
    rows = gaussians.latents(clean), gaussians.latents(noise), gaussians.at(sigma, clean)
    loss = critic_loss(gaussians.velocity_of(MU, covariance), *rows, gaussians.MEAN)
    assert float(loss.mean()) == pytest.approx(floor, rel=1e-13)
    other = critic_loss(gaussians.velocity_of(MU + 0.1, covariance), *rows, gaussians.MEAN)
    assert float(other.mean()) > floor * (1 + 1e-4)


def test_a_trained_critic_reaches_the_floor(gaussians):
    covariance, sigma = gaussians.covariance_of(3, 0), 0.5
    z, noise = gaussians.cubature(3)
    clean = z @ torch.linalg.cholesky(covariance).T + MU
    matrix = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def critic(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return gaussians.latents(noisy.flatten(1) @ matrix.T + offset)

    optimizer = torch.optim.SGD([matrix, offset], lr=0.5, momentum=0.8)
    rows = gaussians.latents(clean), gaussians.latents(noise), gaussians.at(sigma, clean)
    for _ in range(200):
        optimizer.zero_grad()
        loss = critic_loss(critic, *rows, gaussians.MEAN).mean()
        loss.backward()
        optimizer.step()
    lam = (1 - sigma) ** 2 * covariance + sigma**2 * torch.eye(3).double()
    floor = float(torch.trace(covariance @ torch.linalg.inv(lam))) / 3
    assert float(loss.detach()) == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize("weight", ["velocity", "score"])
@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_the_expected_gradient_is_that_of_the_closed_form(gaussians, weight, sigma):
    """Mean part -w s^2 L^-1 (mu - b), matrix part -w a^2 (S L^-1 - C L_C^-1) A with C = A A^T; no
    training, and the mean part only where both have one covariance."""
    b, matrix = start()
    a, eye = 1 - sigma, torch.eye(3, dtype=torch.float64)
    covariance, own = gaussians.covariance_of(3, 0), matrix @ matrix.T
    lam, own_lam = (a**2 * c + sigma**2 * eye for c in (covariance, own))
    omega = 1 / sigma if weight == "velocity" else a**2 / sigma**2
    z, noise = gaussians.cubature(3)
    clean = z @ matrix.T + b
    rows = gaussians.latents(clean), gaussians.latents(noise), gaussians.at(sigma, clean)
    real, fake = gaussians.velocity_of(MU, covariance), gaussians.velocity_of(b, own)
    g = score_difference(*rows, real, fake, gaussians.MEAN, weight=weight).g.flatten(1)
    expected = -omega * sigma**2 * torch.linalg.inv(lam) @ (MU - b)
    assert (g.mean(0) - expected).abs().max() < 1e-12
    both = covariance @ torch.linalg.inv(lam) - own @ torch.linalg.inv(own_lam)
    expected = -omega * a**2 * both @ matrix
    assert (g.T @ z / len(z) - expected).abs().max() < 1e-12


def test_the_normaliser_is_the_distance_to_the_teachers_clean_prediction(gaussians):
    b, matrix = start()
    covariance, sigma = gaussians.covariance_of(3, 0), 0.4
    z, noise = gaussians.cubature(3)
    clean = z @ matrix.T + b
    rows = gaussians.latents(clean), gaussians.latents(noise), gaussians.at(sigma, clean)
    real, fake = gaussians.velocity_of(MU, covariance), gaussians.velocity_of(b, matrix @ matrix.T)
    noisy = (1 - sigma) * rows[0] + sigma * rows[1]
    x_real, x_fake = (noisy - sigma * v(noisy, rows[2]) for v in (real, fake))
    distance = (rows[0] - x_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    g = score_difference(*rows, real, fake, gaussians.MEAN, weight="normalised").g
    assert (g - (x_fake - x_real) / distance).abs().max() < 1e-13


@pytest.mark.parametrize("weight", WEIGHTS)
def test_matching_exact_scores_ends_at_the_teacher(gaussians, weight):
    covariance, (b, matrix) = gaussians.covariance_of(3, 0), start()
    real, difference = (
        gaussians.velocity_of(MU, covariance),
        partial(score_difference, weight=weight),
    )
    for turn in range(400):
        fake = gaussians.velocity_of(b, matrix @ matrix.T)
        gaussians.step(b, matrix, (0.3, 0.6)[turn % 2], real, fake, difference, 0.4)
    assert (b - MU).abs().max() <= 1e-15
    assert (matrix @ matrix.T - covariance).abs().max() <= 1e-15


def test_a_guided_teacher_is_a_shifted_gaussian(gaussians):
    """v0 + sum w_i (v_i - v0) of Gaussians with one covariance is the velocity of
    N(mu_0 + sum w_i (mu_i - mu_0), S); a scale that is off by one would miss by mu_i - mu_0."""
    covariance, (b, matrix) = gaussians.covariance_of(3, 0), start()
    means = {"controls": MU + 0.02, "context": MU - torch.tensor([0.3, 0.0, -0.1]).double()}
    weights = {"controls": 15.0, "context": 2.0}
    seen = {name: gaussians.velocity_of(mean, covariance) for name, mean in means.items()}
    passes = [gaussians.velocity_of(MU, covariance), *seen.values()]

    def real(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return guided([velocity(noisy, level) for velocity in passes], weights)

    for turn in range(400):
        fake = gaussians.velocity_of(b, matrix @ matrix.T)
        gaussians.step(b, matrix, (0.3, 0.6)[turn % 2], real, fake, score_difference, 0.4)
    end = MU + sum(weights[name] * (means[name] - MU) for name in weights)
    assert (b - end).abs().max() <= 5e-15
    assert (matrix @ matrix.T - covariance).abs().max() <= 5e-15


def test_a_critic_that_learns_five_turns_for_one_ends_at_the_teacher(gaussians):
    """Mean to 0.5 %, covariance to 1.8 %, with Adam on both sides and three noise levels."""
    covariance, mu = gaussians.covariance_of(2, 0), torch.tensor([1.0, -0.5]).double()
    student = [torch.zeros(2).double().requires_grad_(), torch.eye(2).double().requires_grad_()]
    critic = [x.detach().clone().requires_grad_() for x in student]
    real, turns = gaussians.velocity_of(mu, covariance), 150
    optimizers = [torch.optim.Adam(x, lr=0.1, betas=(0.0, 0.99)) for x in (student, critic)]
    z, noise = (x.repeat(3, 1) for x in gaussians.cubature(2))
    level = torch.tensor([0.2, 0.5, 0.8]).double().repeat_interleave(len(z) // 3)[:, None]
    seen = gaussians.latents(noise), level

    def fake(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return gaussians.velocity_of(critic[0], critic[1] @ critic[1].T)(noisy, level)

    for turn in range(6 * turns):
        trains_student = turn % 6 == 5
        optimizer = optimizers[0 if trains_student else 1]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * max(0.01, 1 - turn / (6 * turns))
        optimizer.zero_grad()
        clean = gaussians.latents(z @ student[1].T + student[0])
        if trains_student:
            g = score_difference(clean.detach(), *seen, real, fake, gaussians.MEAN).g
            (g * clean).sum(dim=(1, 2, 3, 4)).mean().backward()
        else:
            critic_loss(fake, clean, *seen, gaussians.MEAN).mean().backward()
        optimizer.step()
    b, matrix = (x.detach() for x in student)
    assert (b - mu).norm() / mu.norm() < 0.005
    assert (matrix @ matrix.T - covariance).norm() / covariance.norm() < 0.018


def test_given_frames_and_scopes_count_apart():
    """A frame at level 0 moves nothing; with scopes a chunk's normaliser sees its frames only."""
    torch.manual_seed(0)
    sequence = LocalSequence(ClipLayout(5))
    clean, noise, v_real, v_fake = (torch.randn(2, 5, 3, 2, 2) for _ in range(4))
    level = torch.tensor([[0.0, 0.4, 0.4, 0.7, 0.7]]).expand(2, 5)
    scopes = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    networks = (lambda x, s: v_real), (lambda x, s: v_fake)
    found = score_difference(clean, noise, level, *networks, sequence.mean, scopes=scopes)
    assert found.g[:, 0].abs().max() == 0
    sigma = level[:, :, None, None, None]
    x_real = (1 - sigma) * clean + sigma * noise - sigma * v_real
    for frames in (slice(1, 3), slice(3, 5)):
        distance = (clean - x_real)[:, frames].abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        expected = (sigma * (v_real - v_fake))[:, frames] / distance
        assert torch.allclose(found.g[:, frames], expected, rtol=1e-5)
    gap = (v_real - v_fake)[:, 1:].square().mean((1, 2, 3, 4)) / v_real[:, 1:].square().mean(
        (1, 2, 3, 4)
    )
    assert torch.allclose(found.gap, gap.sqrt(), rtol=1e-5)
    whole = score_difference(clean, noise, level, *networks, sequence.mean)
    assert not torch.allclose(whole.g[:, 3:], found.g[:, 3:], rtol=1e-2)


def test_rounding_of_guided_bf16_outputs_is_not_repeated_in_bf16():
    """Networks may answer in bf16; guidance and difference are fp32."""
    torch.manual_seed(0)
    base, seen = (torch.randn(1, 1, 3, 2, 2).bfloat16() for _ in range(2))
    passes = iter((base, seen))
    found = guided(
        velocities(lambda *_: next(passes), base, torch.ones(1, 1), [None] * 2, [None] * 2),
        {"controls": 15.0},
    )
    assert found.dtype == torch.float32
    expected = base.double() + 15 * (seen.double() - base.double())
    assert torch.allclose(found.double(), expected, rtol=1e-6)
