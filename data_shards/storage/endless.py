"""Define what a server may send at most, and the error when it goes on."""

from __future__ import annotations

MOST_WHOLE = 2**28  # bytes of a file that is read as a whole: dataset.json, checksums, null text


class EndlessError(OSError):
    """Report a server that sends more than was asked for, perhaps without an end."""
