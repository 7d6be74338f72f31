"""IDA and ISG against closed forms."""

from __future__ import annotations

import pytest
import torch

from wm_train.objectives.alignment import SOFT, align_critic_, middle_level, segment_loss


def test_an_aligned_critic_approaches_the_student_as_a_power():
    """psi_n - theta = keep^n (psi_0 - theta), with moments untouched."""
    torch.manual_seed(0)
    student = [torch.randn(3, 4).double(), torch.randn(5).double()]
    critic = [torch.nn.Parameter(torch.randn_like(x)) for x in student]
    optimizer = torch.optim.AdamW(critic, lr=0.0, weight_decay=0.0)
    sum((x**2).sum() for x in critic).backward()
    optimizer.step()
    before = [x.detach().clone() for x in critic]
    moments = [{k: v.clone() for k, v in optimizer.state[x].items()} for x in critic]
    for _ in range(7):
        align_critic_([x.data for x in critic], student, 0.97)
    for x, start, theta, kept in zip(critic, before, student, moments, strict=True):
        assert torch.allclose(x.detach() - theta, 0.97**7 * (start - theta), rtol=1e-12)
        assert all(torch.equal(optimizer.state[x][k], v) for k, v in kept.items())


@pytest.mark.parametrize("keep", [1.0, 0.0])
def test_an_aligned_critic_stays_or_becomes_the_student_to_the_bit(keep):
    student, critic = torch.randn(2, 3, 4)
    before = critic.clone()
    align_critic_([critic], [student], keep)
    assert torch.equal(critic, before if keep else student)


def gaussian_step(x, start: float, stop: float, s: float):
    """Return one Euler step of the exact flow of N(0, s^2 I)."""
    a = 1 - start
    return x * (1 + (stop - start) * (start - a * s**2) / (a**2 * s**2 + start**2))


@pytest.mark.parametrize("s", [0.0, 0.5])
def test_segment_guidance_is_two_euler_steps_against_one(s):
    """Zero for a point mass, whose flow is straight; else the closed form."""
    sigma, following, middle = 0.9, 0.5, 0.7

    def exact(x, level):
        a, level = 1 - level[:, :, None, None, None], level[:, :, None, None, None]
        return x * (level - a * s**2) / (a**2 * s**2 + level**2)

    torch.manual_seed(0)
    noisy, free = torch.randn(2, 3, 4, 1, 1).double(), torch.ones(2, 3).double()
    free[:, 0], given = 0.0, noisy[:, 0].clone()

    def student(x, level, sigma):
        assert level.max() == sigma
        assert torch.equal(x[:, 0], given)
        assert level[:, 0].abs().max() == 0
        return exact(x, level.clamp(min=1e-9))

    flow = student(noisy, sigma * free, sigma)
    each = segment_loss(flow, student, student, noisy, sigma, following, middle, free)
    assert each[:, 0].abs().max() == 0
    loss = each[:, 1:].mean(1)
    x = noisy[:, 1:]
    two = gaussian_step(gaussian_step(x, sigma, middle, s), middle, following, s)
    d = gaussian_step(x, sigma, following, s) - two
    expected = ((d**2 + SOFT**2).sqrt() - SOFT).mean(dim=(1, 2, 3, 4))
    assert torch.allclose(loss, expected, rtol=1e-12, atol=1e-16)
    assert (loss.max() < 1e-15) == (s == 0)


def test_only_the_one_step_gets_a_gradient():
    scale = torch.tensor(0.3, requires_grad=True)
    calls = []

    def student(x, level, sigma):
        calls.append(torch.is_grad_enabled())
        return scale * x

    free, noisy = torch.ones(1, 2), torch.randn(1, 2, 3, 1, 1)
    flow = student(noisy, 0.9 * free, 0.9)
    loss = segment_loss(flow, student, lambda x, *_: 0.5 * x, noisy, 0.9, 0.5, 0.7, free)
    loss.sum().backward()
    assert calls == [True, False]
    d = -0.4 * (noisy * 0.3) - (-0.2 * noisy * 0.5 - 0.2 * 0.3 * (noisy - 0.1 * noisy))
    expected = (d / (d**2 + SOFT**2).sqrt() * -0.4 * noisy).mean(dim=(2, 3, 4)).sum()
    assert torch.allclose(scale.grad, expected, rtol=1e-5)


def test_the_middle_level_keeps_its_distance():
    """0.05 from both ends, and a quarter of a short step: as Waypoint has one."""
    assert middle_level(0.9, 0.5, 0.0) == pytest.approx(0.85)
    assert middle_level(0.9, 0.5, 1.0) == pytest.approx(0.55)
    assert middle_level(1.0, 0.9, 0.0) == pytest.approx(0.975)
    assert middle_level(1.0, 0.9, 1.0) == pytest.approx(0.925)
    assert middle_level(0.03, 0.0, 0.5) == pytest.approx(0.015)
