"""Turn SIGINT and SIGTERM into a flag, so that a launcher can stop its workers properly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Caught:
    """Store the first signal that arrived, if any."""

    number: int | None = None


@contextmanager
def caught() -> Iterator[Caught]:
    """Record the first SIGINT or SIGTERM while entered; the second one raises KeyboardInterrupt."""
    state = Caught()

    def note(number: int, frame: FrameType | None) -> None:
        if state.number is not None:
            raise KeyboardInterrupt
        state.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
