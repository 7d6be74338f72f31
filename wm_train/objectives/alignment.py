"""Draw a critic to its student, and a student's steps to its teacher's path (SenseFlow, Ge et al.
2025; Waypoint-1.5 §4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wm_train.objectives.score_difference import spread, widened
from wm_train.sampling.steps import Velocity

ROOM = 0.05  # of the middle level from both ends of the step, at most a quarter of it
SOFT = 1e-3  # where the pseudo-Huber loss turns from square to absolute


@torch.no_grad()
def align_critic_(critic: Sequence[Tensor], student: Sequence[Tensor], keep: float) -> None:
    """Move the critic's parameters to keep * critic + (1 - keep) * student, in place (IDA, implicit
    distribution alignment). Moments stay as they are."""
    torch._foreach_lerp_(list(critic), list(student), 1 - keep)


def middle_level(sigma: float, following: float, share: float) -> float:
    """Return the level at `share` (0 to 1) of the way down from sigma to the next level, apart from
    both by `ROOM`, or by a quarter of a step that is short: from 1 to 0.9, `ROOM` alone would leave
    one level."""
    room = min(ROOM, (sigma - following) / 4)
    return sigma - room - share * (sigma - following - 2 * room)


def segment_loss(
    flow: Tensor,
    student: Velocity,
    teacher: Velocity,
    noisy: Tensor,
    sigma: float,
    following: float,
    middle: float,
    free: Tensor,
) -> Tensor:
    """Return the loss of intra-segment guidance (ISG) at each frame, [B, t], 0 at given ones: a
    pseudo-Huber mean over its numbers.

    One Euler step of the student from sigma to the next level is drawn to where a step of the
    teacher to the middle level and one of the student from there lead. noisy: [B, t, C, h, w] at
    sigma; flow: the student's velocity there, which alone takes a gradient; free: [B, t], 1 at
    frames that are denoised, 0 at given ones, which stay.
    """

    def step(flow: Tensor, x: Tensor, start: float, stop: float) -> Tensor:
        return x + (stop - start) * spread(free) * widened(flow)

    with torch.no_grad():
        halfway = step(teacher(noisy, sigma * free, sigma), noisy, sigma, middle)
        target = step(student(halfway, middle * free, middle), halfway, middle, following)
    distance = step(flow, noisy, sigma, following) - target
    huber = (distance.square() + SOFT**2).sqrt() - SOFT
    return huber.mean(dim=(2, 3, 4)) * free
