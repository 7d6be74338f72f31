"""Make denoising steps at named noise levels by one of two rules, `euler` or `renoise`.

Both predict the clean latents x0 = x - sigma v first (rectified flow, v = eps - x0). `euler`
follows the flow to the next level, x + (sigma' - sigma) v, and so keeps the noise it started with;
`renoise` mixes x0 with fresh noise, (1 - sigma') x0 + sigma' eps'. In few steps they end in
different distributions (levels 1, .9, .75, .3 and data of standard deviation .5: .289 and .251), so
a student is trained with the rule that it is sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# (latents, level [B, t], sigma) -> velocity like latents
Velocity = Callable[[Tensor, Tensor, float], Tensor]
Fresh = Callable[[int], Tensor]  # fresh noise like latents before step k = 2, 3, ...


class Passed(NamedTuple):
    """Hold the last of some denoising steps.

    noisy: [B, t, C, h, w], its input; level: [B, t], the sigma of each frame, 0 at given frames;
    sigma: the step's; clean: its prediction of the clean latents, given frames as given.
    """

    noisy: Tensor
    level: Tensor
    sigma: float
    clean: Tensor


# (a step that was passed, its velocity, the next sigma, fresh noise) -> latents at the next sigma
Step = Callable[[Passed, Tensor, float, Callable[[], Tensor]], Tensor]


def _euler(
    passed: Passed, velocity: Tensor, following: float, fresh: Callable[[], Tensor]
) -> Tensor:
    return passed.noisy + (following - passed.sigma) * velocity


def _renoise(
    passed: Passed, velocity: Tensor, following: float, fresh: Callable[[], Tensor]
) -> Tensor:
    return (1.0 - following) * passed.clean + following * fresh().to(passed.clean.dtype)


STEPS: dict[str, Step] = {"euler": _euler, "renoise": _renoise}


def clean_of(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Return the prediction of the clean latents, x - sigma v."""
    return noisy - sigma * velocity


def denoise(
    velocity: Velocity,
    noise: Tensor,
    clean: Tensor,
    given: Tensor,
    levels: Sequence[float],
    *,
    sampler: str,
    fresh: Fresh,
    exit: int | None = None,
) -> Passed:
    """Return step `exit` (None: the last) of those from noise [B, t, C, h, w] at sigma 1; frames
    marked in clean [B, t] stay `given`.

    velocity is called once per step. `level` is 0 at given frames; `sigma` is the step's, also
    where all frames are given, so that all ranks pick the same expert. levels: where the steps
    start, and the 0 after the last. Raises ValueError for an unknown sampler or exit.
    """
    steps = len(levels) - 1
    exit = steps if exit is None else exit
    if sampler not in STEPS:
        raise ValueError(
            f"sampling failed: got sampler {sampler!r}, expected one of {', '.join(STEPS)}"
            " (key sampler.step). Fix: sampler.step=renoise"
        )
    if not 1 <= exit <= steps:
        raise ValueError(
            f"sampling failed: got exit {exit}, expected 1 to {steps}, a step of the levels"
            f" {list(levels[:-1])}. Fix: exit={steps}"
        )
    hold = clean[:, :, None, None, None]
    latents = torch.where(hold, given, noise)
    for step, (sigma, following) in enumerate(pairwise(levels), start=1):
        level = torch.where(clean, 0.0, sigma)
        flow = velocity(latents, level, sigma)
        passed = Passed(
            latents, level, sigma, torch.where(hold, given, clean_of(latents, flow, sigma))
        )
        if step == exit:
            break
        moved = STEPS[sampler](passed, flow, following, partial(fresh, step + 1))
        latents = torch.where(hold, given, moved)
    return passed
