"""Being asked to leave: SIGTERM or SIGUSR1 ends a run after the step in hand, with its state
saved."""

from __future__ import annotations

import signal
from types import FrameType


class Preempted(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """A flag that the signal handler of one process raises; all processes see it in the next step's
    gathered figures."""

    def __init__(self) -> None:
        self.raised = False

    def listen(self) -> StopRequest:
        """Raise the flag on SIGTERM and SIGUSR1 from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)
        return self

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
