"""What happens when a rank dies, the same under every launcher that watches ranks: restart all, with back-off, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from launch.progress import ProgressView
from launch.signals import Caught, caught
from launch.spec import INTERRUPTED, USER_ERROR, LaunchSpec, describe_exit


@dataclass(frozen=True)
class Death:
    """How a rank ended. `code` None: its node, or the process that kept it, was lost."""

    rank: int
    code: int | None
    said: str  # the last lines of its log, or why it is thought lost

    def __str__(self) -> str:
        return f"rank {self.rank} died: " + (
            "its node, or the process that kept it, was lost" if self.code is None else describe_exit(self.code)
        )

    @property
    def exit_code(self) -> int:
        """As a shell would report it; 1 for a loss."""
        if self.code is None:
            return 1
        return self.code if self.code > 0 else INTERRUPTED - self.code


class Attempt(Protocol):
    """Starts all ranks, watches them, takes them down; None: all ended with 0, or the driver was told to stop."""

    def __call__(self, spec: LaunchSpec, number: int, view: ProgressView, stop: Caught) -> Death | None: ...


def run_attempts(spec: LaunchSpec, view: ProgressView, attempt: Attempt, sleep: Callable[[float], None] = time.sleep) -> int:
    """Attempts until one succeeds or trying again would not help; returns the exit code."""
    last_step: int | None = None
    with caught() as stop:
        for number in range(spec.max_restarts + 1):
            death = attempt(spec, number, view, stop) if stop.number is None else None
            if stop.number is not None:
                view.text(f"stopped by signal {stop.number}")
                return INTERRUPTED + stop.number
            if death is None:
                return 0
            if death.said:
                view.text(f"rank {death.rank}'s last lines:\n" + death.said)
            at = f" at step {view.step}" if view.step is not None else ""
            view.text(f"{death}{at}; logs in {spec.logs / f'attempt_{number}'}")
            if death.code == USER_ERROR:
                return USER_ERROR
            if view.step is not None and view.step == last_step:
                view.text(f"two deaths at step {last_step}: trying again would not help")
                return death.exit_code
            last_step = view.step
            if number == spec.max_restarts:
                view.text(f"given up after {spec.max_restarts} restarts")
                return death.exit_code
            pause = min(spec.backoff_s * 2**number, spec.backoff_limit_s)
            view.text(f"restart {number + 1} of {spec.max_restarts} in {pause:.0f} s, from the last checkpoint")
            for _ in range(round(pause * 10)):
                if stop.number is None:
                    sleep(0.1)
    raise AssertionError("the last attempt returns")
