"""Handle requests to stop: SIGTERM, SIGUSR1 or Ctrl-C end a run with its state saved.

While steps are taken a request is a flag: all processes agree on it and save before they leave.
At other times, while the run starts or samples, nothing is lost by leaving at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from wm_train.world import World


class Preempted(BaseException):
    """Report that the run was asked to stop and has saved its state.

    No Exception, as it may be raised inside any library, which must not take it for a failure.
    """


class StopSeenError(Exception):
    """Report in the middle of an evaluation that some process was asked to stop."""


class StopRequest:
    """Store a flag, raised by the signal handler of one process.

    saved: what Preempted says when it is raised at once; empty while leaving would lose work.
    """

    def __init__(self) -> None:
        self.raised = False
        self.saved = "asked to stop before the first step: there is nothing to save"

    def listen(self) -> StopRequest:
        """Raise the flag on SIGTERM, SIGUSR1 and Ctrl-C from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._raise)
        return self

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:  # the second Ctrl-C does not wait
            os._exit(128 + number)
        self.raised = True
        self.leave_if_saved()

    def work_from_here(self) -> None:
        """Begin a part of the run whose work would be lost by leaving at once."""
        self.saved = ""

    def all_saved(self, message: str) -> None:
        """End that part: from now on a request raises Preempted with this message at once."""
        self.saved = message
        self.leave_if_saved()

    def leave_if_saved(self) -> None:
        """Raise Preempted if the flag is up and nothing would be lost."""
        if self.raised and self.saved:
            raise Preempted(self.saved)

    def agreed(self, world: World) -> bool:
        """Return whether any process was asked to stop. Every process must call this."""
        return bool(world.gather_numbers([float(self.raised)]).any())

    @contextmanager
    def watched(self, model: nn.Module, world: World) -> Iterator[None]:
        """Raise StopSeenError at the next forward pass of `model` once a process was asked to stop.

        Every process makes as many passes, so all of them leave at the same one.
        """

        def look(*_: object) -> None:
            if self.agreed(world):
                raise StopSeenError

        # before a sharded model gathers its weights, which it would then keep
        hook = model.register_forward_pre_hook(look, prepend=True)
        try:
            yield
        finally:
            hook.remove()
