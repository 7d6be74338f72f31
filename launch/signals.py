"""Turn signals that ask to stop into a flag, so that a launcher can stop its workers properly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# a lost terminal and Ctrl-\ are no reason either to lose what was not saved
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TYPED = (signal.SIGINT, signal.SIGQUIT)


@dataclass
class Caught:
    """Store the first signal that arrived, if any."""

    number: int | None = None


@contextmanager
def caught(state: Caught | None = None) -> Iterator[Caught]:
    """Record the first signal of ASKING while entered, in `state` if given.

    A second one that was typed raises KeyboardInterrupt. Others may come twice by themselves, as
    the shell and the kernel both report a lost terminal. `nohup` stays in force.
    """
    state = state or Caught()

    def note(number: int, frame: FrameType | None) -> None:
        if state.number is None:
            state.number = number
        elif number in TYPED:
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, note)
        for number in ASKING
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back(*numbers: signal.Signals) -> Iterator[None]:
    """Deliver these signals only when this ends, and never to processes that are started inside.

    A terminal sends them to all processes of its foreground, and those that hold the workers must
    not go before these have saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
