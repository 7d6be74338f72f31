"""Mark the lines by which a process tells its launcher something, so that nothing else can.

Such a line is `@<kind> <token> {json}` on the process's output, which reaches the launcher over
every kind of network; a pipe or a file of its own would not. The launcher draws the token, hands it
over as an environment variable, and neither shows nor logs it. What libraries print, such as a line
about a file that somebody else has made, is text.
"""

from __future__ import annotations

import json
from typing import Any

VARIABLE = "LAUNCH_PROGRESS"  # with the token; without it nobody listens
PROGRESS, FAILURES = "progress", "failures"  # kinds of lines


def sign(kind: str, token: str, value: Any) -> str:
    """Return the line, without its newline. Write both at one go, so that no other thread's text
    comes between. Without a token it is for people alone."""
    return f"@{kind} {token}{' ' if token else ''}{json.dumps(value)}"


def parse(line: str, token: str, kind: str = PROGRESS) -> tuple[str, Any]:
    """Return a line's text without the token, and what a signed line of this kind says, else None.

    Text that had no newline of its own may stand before it.
    """
    before, mark, rest = line.partition(f"@{kind} {token} ")
    if not (token and mark):
        return line, None
    try:
        value, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return without(line, token), None
    return without(before + rest[end:], token), value


def without(line: str, token: str) -> str:
    """Return a line without the token, as logs keep it."""
    return line.replace(f"{token} ", "") if token else line
