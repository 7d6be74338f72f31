"""The step guard: no update is made from a loss or a gradient that cannot be right (design §9).

All processes judge the same gathered figures before clipping, so all of them stop or skip together, with the parameters untouched. One
NaN that got past would poison every gradient in clipping and both moments of the optimizer after it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from wm_train.config import TrainerConfig

WINDOW = 32  # accepted losses that a spike is measured against


class BadStepError(FloatingPointError):
    """A step that must not be taken."""


class Guard:
    """Judges steps. `recent` is part of the checkpoint, so a continued run judges as the undisturbed one."""

    def __init__(self, config: TrainerConfig, recent: Sequence[float] = ()) -> None:
        self.config = config
        self.recent = deque(recent, maxlen=WINDOW)
        self.skipped: list[int] = []

    def accepts(self, step: int, loss: float, by_rank: Sequence[tuple[float, float]]) -> bool:
        """Whether to take step `step` (from 1): True, or False under the policy `skip`.

        by_rank: (loss, squared gradient norm) of every process.
        Errors: BadStepError under the policy `stop`, or when `bad_step_budget` skips are used up.
        """
        problem = self._problem(loss, by_rank)
        if problem is None:
            self.recent.append(loss)
            return True
        hint = "Fix: lower the learning rate, look at that batch, or leave it out with trainer.skip_steps"
        if self.config.on_bad_step == "stop":
            raise BadStepError(f"step {step}: {problem}. Parameters are as after step {step - 1}. {hint}")
        self.skipped.append(step)
        if len(self.skipped) > self.config.bad_step_budget:
            raise BadStepError(f"step {step}: {problem}; steps {self.skipped} exceed trainer.bad_step_budget. {hint}={self.skipped}")
        return False

    def _problem(self, loss: float, by_rank: Sequence[tuple[float, float]]) -> str | None:
        bad = [rank for rank, figures in enumerate(by_rank) if not all(math.isfinite(x) for x in figures)]
        if bad:
            seen = ", ".join(f"rank {r}: loss {by_rank[r][0]}, squared gradient norm {by_rank[r][1]}" for r in bad[:8])
            return f"got {seen}, expected finite numbers"
        limit = self.config.spike_factor
        if limit and len(self.recent) >= WINDOW // 4 and loss > limit * median(self.recent):
            return f"got loss {loss}, expected at most {limit} x {median(self.recent):.4g}, the median of the last steps"
        return None
