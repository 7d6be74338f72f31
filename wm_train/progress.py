"""What a worker says while it runs: plain lines, and `@progress {json}` lines that a launcher turns into a progress bar."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Progress:
    """Speaks for the run on rank 0 and is silent elsewhere."""

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks
        self.started = time.monotonic()
        self.first_step: int | None = None

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.speaks:
            print(text, flush=True)

    def step(self, stage: str, step: int, steps: int, **figures: Any) -> None:
        """Step `step` of `steps` is done. The time left is estimated from the steps of this process."""
        if not self.speaks:
            return
        if self.first_step is None:  # the first step pays for warm-up, so the clock starts after it
            self.first_step, self.started = step, time.monotonic()
        done = step - self.first_step
        left = (time.monotonic() - self.started) / done * (steps - step) if done else None
        print("@progress " + json.dumps({"stage": stage, "step": step, "steps": steps, "eta_s": left, **figures}), flush=True)


def complain(text: str) -> None:
    """One line on the error stream, from any rank."""
    print(text, file=sys.stderr, flush=True)
