"""Count the verb calls of a forward pass, for views that store something per call."""

from __future__ import annotations

from contextlib import AbstractContextManager


class Calls:
    """Number verb calls from 0; a checkpointed function's second run gets its first run's numbers.

    again: within such a second run, which stores nothing.
    """

    def __init__(self) -> None:
        self.made = 0
        self.again = False

    def next(self) -> int:
        """Return the number of the call that is being made."""
        self.made += 1
        return self.made - 1

    def rewind(self) -> AbstractContextManager[None]:
        """Return a context in which calls count from where they stand now."""
        return _Rewound(self)


class _Rewound(AbstractContextManager[None]):
    """Count calls from where they stood when this was made."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.start = calls, calls.made
        self.outside: list[tuple[int, bool]] = []

    def __enter__(self) -> None:
        self.outside.append((self.calls.made, self.calls.again))
        self.calls.made, self.calls.again = self.start, True

    def __exit__(self, *error: object) -> None:
        self.calls.made, self.calls.again = self.outside.pop()
