"""What happens when a rank dies, the same under every launcher that watches ranks: restart all,
with back-off, within a budget."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from launch.progress import ProgressView
from launch.signals import Caught, caught
from launch.spec import INTERRUPTED, NO_STORAGE, USER_ERROR, LaunchSpec, describe_exit

# the room is there already: the spare part of it was reserved, the rest is what the stopped workers
# held
GROWTH_PLACE_S = 10.0


@dataclass(frozen=True)
class Death:
    """How a rank ended. `code` None: its node, or the process that kept it, was lost."""

    rank: int
    code: int | None
    said: str  # the last lines of its log, or why it is thought lost

    def __str__(self) -> str:
        return f"rank {self.rank} died: " + (
            "its node, or the process that kept it, was lost"
            if self.code is None
            else describe_exit(self.code)
        )

    @property
    def exit_code(self) -> int:
        """As a shell would report it; 1 for a loss."""
        if self.code is None:
            return 1
        return self.code if self.code > 0 else INTERRUPTED - self.code


def cause(deaths: list[Death]) -> Death | None:
    """The death that explains the others: a user's mistake, then a lost node, silent storage, a
    signal from outside, then the first."""

    def weight(death: Death) -> int:
        if death.code == USER_ERROR:
            return 0
        if death.code is None:
            return 1
        if death.code == NO_STORAGE:
            return 2
        # SIGABRT is how a collective library ends a process whose peer has gone: a consequence.
        return 3 if death.code < 0 and death.code != -signal.SIGABRT else 4

    return min(deaths, key=weight) if deaths else None


@dataclass(frozen=True)
class Growth:
    """The workers have saved and left, because there is room for more of them."""

    workers: int


class Attempt(Protocol):
    """Starts all ranks, watches them, takes them down; None: all ended with 0, or the driver was
    told to stop."""

    def __call__(
        self, spec: LaunchSpec, number: int, view: ProgressView, stop: Caught
    ) -> Death | Growth | None: ...


def run_attempts(
    spec: LaunchSpec,
    view: ProgressView,
    attempt: Attempt,
    sleep: Callable[[float], None] = time.sleep,
    stop: Caught | None = None,
) -> int:
    """Attempts until one succeeds or trying again would not help; returns the exit code. `stop`:
    who listens to signals, if not we."""
    number, restarts, asked = 0, 0, spec
    last_step: int | None = None
    with nullcontext(stop) if stop else caught() as stop:
        while True:
            outcome = attempt(asked, number, view, stop) if stop.number is None else None
            if stop.number is not None:
                view.text(f"stopped by signal {stop.number}")
                return INTERRUPTED + stop.number
            if outcome is None:
                return 0
            number, asked = number + 1, spec
            if isinstance(outcome, Growth):
                view.text(
                    f"room for {outcome.workers} workers: growing, from the checkpoint just made"
                )
                asked = replace(spec, place_s=min(GROWTH_PLACE_S, spec.place_s))
                continue
            if outcome.said:
                view.text(f"rank {outcome.rank}'s last lines:\n" + outcome.said)
            at = f" at step {view.step}" if view.step is not None else ""
            view.text(f"{outcome}{at}; logs in {spec.logs / f'attempt_{number - 1}'}")
            if outcome.code == USER_ERROR:
                return USER_ERROR
            excused = outcome.code in (
                None,
                NO_STORAGE,
            )  # a lost node and silent storage are no fault of the step
            if not excused and view.step is not None and view.step == last_step:
                view.text(f"two deaths at step {last_step}: trying again would not help")
                return outcome.exit_code
            last_step = view.step
            if restarts == spec.max_restarts:
                view.text(f"given up after {spec.max_restarts} restarts")
                return outcome.exit_code
            pause = min(spec.backoff_s * 2**restarts, spec.backoff_limit_s)
            restarts += 1
            view.text(
                f"restart {restarts} of {spec.max_restarts} in {pause:.0f} s, from the last"
                " checkpoint"
            )
            for _ in range(round(pause * 10)):
                if stop.number is None:
                    sleep(0.1)
