"""Write and read the lines of `metrics.jsonl`: strict JSON, a number per figure.

JSON knows no NaN and no infinity: NaN is null, infinities are the strings "Infinity" and
"-Infinity", which `float` and JavaScript's `Number` take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wm_train.storage import read_regular

INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
FINITE = {word: value for value, word in INFINITE.items()}


def to_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of strict JSON."""
    plain = {
        key: None if value != value else INFINITE.get(value, value) for key, value in row.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, None for a damaged one."""
    try:
        plain = json.loads(line)
        row = {
            key: math.nan if value is None else FINITE.get(value, value)
            for key, value in plain.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    whole = type(row.get("step")) is int and row["step"] >= 0
    numbers = all(isinstance(value, int | float) for value in row.values())
    return row if whole and numbers else None


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of a record and the numbers of its damaged lines, from 1.

    The last line may be cut by a crash: that is no damage, as its step will be repeated.
    """
    rows, damaged = list[dict[str, Any]](), []
    *lines, last = read_regular(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if (row := parse_row(last)) is not None:  # whole but for its end
        rows.append(row)
    return rows, damaged
