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
