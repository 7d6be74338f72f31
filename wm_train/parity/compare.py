"""Compare losses, output and gradients of two runs of one case."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """Hold losses [B]; velocity [B, T, C, h, w], None of several networks; the summed gradient of
    every parameter that has one."""

    losses: Tensor
    velocity: Tensor | None
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Hold ‖result − reference‖ / ‖reference‖ of one tensor; absolute when the reference is
    zero."""

    name: str
    size: float
    error: float


def compare(reference: Outcome, result: Outcome) -> list[Comparison]:
    """Compare loss, velocity and every gradient, in the model's order."""
    shown = reference.velocity
    pairs: list[tuple[str, Tensor, Tensor | None]] = [
        ("loss", reference.losses, result.losses),
        *([] if shown is None else [("velocity", shown, result.velocity)]),
        *(
            (name, gradient, result.gradients.get(name))
            for name, gradient in reference.gradients.items()
        ),
    ]
    pairs += [
        (name, torch.zeros_like(gradient), gradient)
        for name, gradient in result.gradients.items()
        if name not in reference.gradients
    ]
    rows = []
    for name, a, b in pairs:
        size = float(a.double().norm())
        error = math.inf if b is None else float((a.double() - b.double()).norm())
        rows.append(Comparison(name, size, error / size if size > 0 else error))
    return rows
