"""Handle preemption: SIGTERM or SIGUSR1 ends a run after the current step, with its state saved."""

from __future__ import annotations

import signal
from types import FrameType


class Preempted(Exception):
    """Report that the run was asked to stop and has saved its state."""


class StopRequest:
    """Store a flag, raised by the signal handler of one process.

    All processes see it in the next step's gathered figures.
    """

    def __init__(self) -> None:
        self.raised = False

    def listen(self) -> StopRequest:
        """Raise the flag on SIGTERM and SIGUSR1 from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)
        return self

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
