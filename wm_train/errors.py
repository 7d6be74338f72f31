"""Name the mistakes that end a run without a restart, and the exit codes of commands and ranks."""

from __future__ import annotations

DONE = 0
FAILED = 1  # anything else: launchers start again
USER_ERROR = 2  # somebody must change something, so a restart would not help
NO_STORAGE = 74  # storage did not answer for `data.retry_s`
# EX_TEMPFAIL of sysexits.h: asked to stop, and saved; start the same command again to go on
PREEMPTED = 75


class SetupError(ValueError):
    """Report a user's mistake, found before or in the first step. Nothing was changed."""


class StorageError(ValueError):
    """Report storage that could not be read or written, though the run itself is in order.

    passing: it may be there again, so a restart may help; else somebody must act, make room say.
    """

    def __init__(self, message: str, passing: bool) -> None:
        self.passing = passing
        super().__init__(message)
