"""Refuse optimizer steps from a loss or gradient that cannot be right.

All processes judge the same gathered figures before clipping, so all of them stop or skip together,
with the parameters untouched. A single NaN would otherwise poison every gradient in clipping and
then both moments of the optimizer.

Skipping has a budget. When it is used up, the problem began before the first bad step, so the run
goes back to the checkpoint before that step and leaves out all batches from there to the last bad
one (PaLM, §5.1): skipping only the bad ones again would fail in the same way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from wm_train.config.roles import STUDENT
from wm_train.config.schema import TrainerConfig

WINDOW = 32  # accepted losses that define a spike


class BadStepError(FloatingPointError):
    """Report a step that must not be taken."""


class RewindError(Exception):
    """Ask to go back before step `first` and leave out every batch up to `last`.

    Raised after too many bad steps. earlier: ranges left out by earlier rewinds.
    """

    def __init__(self, first: int, last: int, text: str, earlier: list[tuple[int, int]]) -> None:
        super().__init__(text)
        self.first, self.last, self.text, self.earlier = first, last, text, earlier


class Guard:
    """Judge steps by the recent losses.

    `memory` is part of the checkpoint, so a resumed run decides as an undisturbed one.
    """

    def __init__(self, config: TrainerConfig, memory: Mapping[str, Any] | None = None) -> None:
        memory = memory or {}
        self.config = config
        # accepted losses of each role: those of another network say nothing about this one's
        self.recent: dict[str, deque[float]] = {
            role: deque(losses, maxlen=WINDOW)
            for role, losses in (
                {STUDENT: memory.get("recent", ())} | memory.get("roles", {})
            ).items()
        }
        self.skipped: list[int] = list(memory.get("skipped", ()))  # since the last rewind
        self.rewound: list[tuple[int, int]] = [
            (first, last) for first, last in memory.get("rewound", ())
        ]

    def memory(self) -> dict[str, Any]:
        """Return the part of the state that a checkpoint stores.

        That is the last losses, the steps skipped, and the ranges of steps left out after a rewind.
        """
        others = {role: list(own) for role, own in self.recent.items() if role != STUDENT}
        return {
            "recent": list(self.recent[STUDENT]),
            **({"roles": others} if others else {}),
            "skipped": list(self.skipped),
            "rewound": list(self.rewound),
        }

    def leaves_out(self, step: int) -> bool:
        """Return True if this step's batch is left out: in `trainer.skip_steps`, or by a rewind."""
        return step in self.config.skip_steps or any(
            first <= step <= last for first, last in self.rewound
        )

    def accepts(
        self, step: int, loss: float, by_rank: Sequence[tuple[float, float]], role: str = STUDENT
    ) -> bool:
        """Return True to take step `step` (from 1), or False under the policy `skip`.

        by_rank: (loss, squared gradient norm) of every process; role: of the network that would
        step. Raises BadStepError under the
        policy `stop`, and when `bad_step_budget` skips and `rewinds` are used up; RewindError when
        only the skips are.
        """
        recent = self.recent.setdefault(role, deque(maxlen=WINDOW))
        problem = self._problem(loss, by_rank, recent)
        if problem is None:
            recent.append(loss)
            return True
        hint = (
            "Fix: lower the learning rate, look at that batch, or leave it out with"
            " trainer.skip_steps"
        )
        if self.config.on_bad_step == "stop":
            raise BadStepError(
                f"step {step}: {problem}. Parameters are as after step {step - 1}. {hint}"
            )
        self.skipped.append(step)
        if len(self.skipped) > self.config.bad_step_budget:
            text = f"step {step}: {problem}; steps {self.skipped} exceed trainer.bad_step_budget"
            if len(self.rewound) < self.config.rewinds:
                raise RewindError(self.skipped[0], step, text, list(self.rewound))
            raise BadStepError(f"{text}, after {len(self.rewound)} rewinds. {hint}={self.skipped}")
        return False

    def _problem(
        self, loss: float, by_rank: Sequence[tuple[float, float]], recent: Sequence[float]
    ) -> str | None:
        bad = [
            rank
            for rank, figures in enumerate(by_rank)
            if not all(math.isfinite(x) for x in figures)
        ]
        if bad:
            seen = ", ".join(
                f"rank {r}: loss {by_rank[r][0]}, squared gradient norm {by_rank[r][1]}"
                for r in bad[:8]
            )
            return f"got {seen}, expected finite numbers"
        limit = self.config.spike_factor
        if limit and len(recent) >= WINDOW // 4 and loss > limit * median(recent):
            return (
                f"got loss {loss}, expected at most {limit} x {median(recent):.4g}, the median"
                " of the last steps"
            )
        return None
