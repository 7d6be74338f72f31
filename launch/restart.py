"""Restart all ranks when one dies, with back-off and within a budget, alike in every launcher."""

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

# The room exists already: the additional part was reserved, the stopped workers free the rest.
GROWTH_PLACE_S = 10.0


@dataclass(frozen=True)
class Death:
    """Describe how a rank ended. code None: its node, or the process that ran it, was lost."""

    rank: int
    code: int | None
    said: str  # the last lines of its log, or why it is considered lost

    def __str__(self) -> str:
        return f"rank {self.rank} died: " + (
            "its node, or the process that kept it, was lost"
            if self.code is None
            else describe_exit(self.code)
        )

    @property
    def exit_code(self) -> int:
        """Return the exit code as a shell would report it; 1 for a loss."""
        if self.code is None:
            return 1
        return self.code if self.code > 0 else INTERRUPTED - self.code


def cause(deaths: list[Death]) -> Death | None:
    """Return the death that explains the others.

    In order of preference: a user's mistake, a lost node, storage that does not answer, an external
    signal, then the first death.
    """

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
    """Report that the workers have saved and left because more workers now fit."""

    workers: int


class Attempt(Protocol):
    """Start all ranks, watch them and stop them.

    Returns None if all ended with 0 or the driver was told to stop.
    """

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
    """Run attempts until one succeeds or another would not help; return the exit code.

    stop: the caller's signal handling; None: handle signals here.
    """
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
            # a lost node and silent storage are no fault of the step
            excused = outcome.code in (None, NO_STORAGE)
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
