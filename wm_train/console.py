"""Print a worker's messages: plain lines, and signed lines of progress for the launcher's bar."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from launch.signed import PROGRESS, VARIABLE, sign

LOADED = time.monotonic()


class Progress:
    """Print the run's messages on rank 0, and nothing on other ranks."""

    def __init__(self, speaks: bool, token: str = "") -> None:
        self.speaks, self._token = speaks, token
        self.started = time.monotonic()
        self.first_step: int | None = None
        self._marks: list[
            tuple[str, float]
        ] = []  # what has been done since the process began, and how old it was then

    def mark(self, done: str) -> None:
        """Record the end of a phase that training had to wait for."""
        self._marks.append((done, process_age()))

    def say(self, text: str) -> None:
        """Print one line for a person."""
        if self.speaks:
            print(readable(text), flush=True)

    def step(self, stage: str, step: int, steps: int, **figures: Any) -> None:
        """Report that step `step` of `steps` is done.

        The time left is estimated from the steps of this process.
        """
        if not self.speaks:
            return
        if self.first_step is None:  # the first step pays for warm-up, so the clock starts after it
            self.first_step, self.started = step, time.monotonic()
            self.mark("first step")
            ages = [0.0, *(age for _, age in self._marks)]
            parts = [f"{name} {age - before:.1f}" for (name, age), before in zip(self._marks, ages)]
            self.say(f"first step after {ages[-1]:.1f} s: {', '.join(parts)}")
        done = step - self.first_step
        left = (time.monotonic() - self.started) / done * (steps - step) if done else None
        known = {"stage": stage, "step": step, "steps": steps, "eta_s": left, **figures}
        sys.stdout.write(sign(PROGRESS, self._token, known) + "\n")
        sys.stdout.flush()


def take_token() -> str:
    """Return the token of this worker's progress lines, and keep it from everything that the
    process will start, import or print. Call it first."""
    return os.environ.pop(VARIABLE, "")


def complain(text: str) -> None:
    """Print one line on the error stream, from any rank."""
    print(readable(text), file=sys.stderr, flush=True)


def readable(text: str) -> str:
    """Return a message whose values, which may be a data set's, command no terminal and pass for no
    progress line."""
    safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join(f" {line}" if line.startswith("@") else line for line in safe.split("\n"))


def process_age() -> float:
    """Return the seconds since this process started, or since this module was loaded.

    The latter where the system does not have /proc.
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic() - LOADED
    ticks = int(stat.read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
