"""Compute the noise levels of training and sampling, and mark the frames of a clip that stay
clean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1 as long videos need: sigma -> shift * sigma / (1 + (shift - 1) *
    sigma)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """Return the noise level that `shift_sigma` moves to sigma."""
    return sigma / (shift - (shift - 1.0) * sigma)


def sampling_levels(levels: int | Sequence[float], flow_shift: float = 1.0) -> list[float]:
    """Return the sigmas of the Euler steps, from 1 down to the 0 after the last one.

    levels: how many steps, spaced evenly and then shifted as in training; or the sigmas at which
    they start, taken as they are. Raises ValueError for fewer than one step.
    """
    if not isinstance(levels, int):
        return [*levels, 0.0]
    if levels < 1:
        raise ValueError(
            f"rollout failed: got {levels} steps, expected at least 1 (key trainer.sample_steps). "
            "Fix: trainer.sample_steps=20"
        )
    shifted: list[float] = shift_sigma(torch.linspace(1.0, 0.0, levels + 1), flow_shift).tolist()
    return shifted


def trajectory_levels(levels: Sequence[float], steps: int, flow_shift: float) -> list[float]:
    """Return the sigmas of `sampling_levels` for so many steps, with these levels among them, so
    that a solver passes through them."""
    return sorted({*sampling_levels(steps, flow_shift), *levels}, reverse=True)


def first_frames(layout: ClipLayout, frames: FrameRange, device: torch.device) -> Tensor:
    """Return which of these frames start a document of more than one frame, bool [t]."""
    return torch.tensor(starts_of(layout, frames), dtype=torch.bool, device=device)


def starts_of(layout: ClipLayout, frames: FrameRange) -> list[bool]:
    """Return the marks of `first_frames` as host numbers."""
    ends = [*layout.document_starts[1:], layout.frames]
    starts = {start for start, end in zip(layout.document_starts, ends) if end - start > 1}
    return [frame in starts for frame in range(frames.start, frames.stop)]
