"""Cut what lies beside a video along with its frames: controls per frame, and events by time."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import STATES, Events


def cut_rows(rows: NDArray[Any] | None, numbers: NDArray[np.int64]) -> NDArray[Any] | None:
    """Return the rows of the frames of these numbers; None of None."""
    return None if rows is None else rows[numbers]


def cut_controls(
    controls: NDArray[np.float32], sums: tuple[bool, ...], numbers: NDArray[np.int64], before: int
) -> NDArray[np.float32]:
    """Return [F, A], the controls of the frames of these ascending numbers.

    A row stands for all since the frame shown before, of which `before` is the number for the first
    row: amounts of frames left out are added, states averaged; a frame that is shown again has no
    amounts of its own.
    """
    if (np.diff(numbers, prepend=before) == 1).all():
        return controls[numbers]
    out = np.empty((len(numbers), controls.shape[1]), np.float32)
    for row, (last, number) in enumerate(zip((before, *numbers[:-1]), numbers, strict=True)):
        since = controls[last + 1 : number + 1]
        state = since.mean(axis=0) if len(since) else controls[number]
        out[row] = np.where(np.array(sums), since.sum(axis=0), state)
    return out


def cut_events(
    events: Events,
    start: Fraction,
    seconds: Fraction,
    frame: Fraction,
    stretch: Fraction,
    offset: int = 0,
) -> Events:
    """Return the events of a clip that begins `start` seconds after the video and lasts `seconds`.

    Its times are counted from its first frame, times `stretch`. All earlier keys stay, as one
    may still be held; of the mouse what belongs to the first frame, which lasts `frame` seconds, or
    with an `offset` to those before, by which rows of controls are moved.
    """
    earliest = start - (1 - offset) * frame
    first, end, mouse = (int(t * 10**9) for t in (start, start + seconds, earliest))
    lasting = np.isin(events.kind, STATES)
    stays = (events.time_ns <= end) & (lasting | (events.time_ns > mouse))
    times = events.time_ns[stays].astype(np.int64) - first
    up, down = stretch.numerator, stretch.denominator
    return replace(
        events,
        time_ns=times // down * up + times % down * up // down,
        kind=events.kind[stays],
        code=events.code[stays],
        dx=events.dx[stays],
        dy=events.dy[stays],
    )
