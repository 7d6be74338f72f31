"""Refuse a tracking server whose answer does not end, before the client of its library reads it.

That client reads an answer as a whole: a wrong port that streams for ever would fill the memory of
rank 0.
"""

from __future__ import annotations

import time

MOST_BYTES = 1 << 20  # of an answer to /health, which is a word
MOST_S = 15.0


def check_answer(uri: str) -> None:
    """Raise ValueError if the server at an http address sends more than MOST_BYTES, or for longer
    than MOST_S. Other addresses are files and databases."""
    if not uri.lower().startswith(("http://", "https://")):
        return
    import requests

    size, until = 0, time.monotonic() + MOST_S
    try:
        address = uri.rstrip("/") + "/health"
        with requests.get(address, stream=True, timeout=MOST_S) as answer:
            for chunk in answer.iter_content(1 << 14):
                size += len(chunk)
                if size > MOST_BYTES or time.monotonic() > until:
                    raise ValueError(
                        f"tracker: got an answer of more than {size:,} bytes to /health, expected a"
                        " word, as an MLflow server gives. Fix: tracker.uri=<its address>"
                    )
    except (OSError, requests.RequestException):
        return  # the client's own call meets the same, and is reported
