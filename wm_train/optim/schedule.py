"""Compute the learning rate from the step alone, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

from wm_train.config.kinds import OptimizerConfig


def constant(progress: float) -> float:
    """Return 1 for the whole stage."""
    return 1.0


def cosine(progress: float) -> float:
    """Decay from 1 to 0.1 over the stage; `progress` runs from 0 to 1 after the warm-up."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) in a stage of `steps`.

    A linear warm-up is followed by the schedule.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * SCHEDULES[config.schedule](progress)
