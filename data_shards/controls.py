"""Convert controller events to one control row per latent frame (Waypoint-1.5 §7.2).

Events of up to 10 kHz (key down, key up, mouse motion, scroll) are cut into buckets at the latent
rate. A row is a snapshot at the time of the last raw frame that its latent encodes: the state of
256 buttons, the net mouse displacement since the last snapshot, and the sign of the net scroll
since then. An event at the exact time of a snapshot belongs to it, so every event is in exactly one
bucket: bucket 0 begins one raw frame before raw frame 0, and bucket t ends with the last raw frame
of latent t, at r t / fps of a causal codec and at (r t + r - 1) / fps of a grouped one. `offset`
moves all buckets, as `encode controls_offset=` asks. A key pressed and released inside one bucket
is missed by a snapshot, as in the paper; with `keep_taps` it counts as held there.

Buttons are the virtual-key codes of Windows, mouse buttons among them: 1, 2 and 4 left, right and
middle, 32 the space bar, 16 to 18 shift, control and alt, 48 to 57 and 65 to 90 the ASCII codes of
digits and letters. When the player leaves the window (UNFOCUS) all keys are released, as their
releases are not seen, and what happens until REFOCUS belongs to another window. A key counts as
held before a clip only if an event says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.time_layout import TimeLayout

KEY_DOWN, KEY_UP, MOUSE, SCROLL, UNFOCUS, REFOCUS = range(6)
STATES = (KEY_DOWN, KEY_UP, UNFOCUS, REFOCUS)  # kinds of events that last until the next
MOST_OFFSET = 64  # raw frames
BUTTONS = 256
CONTROL_NAMES = (
    *(f"button_{code:03d}" for code in range(BUTTONS)),
    "mouse_dx",
    "mouse_dy",
    "scroll_sign",
)
# mouse motion adds up; the sign of the scroll is a state, as it is within 1 already
CONTROL_SUMS = (*(False,) * BUTTONS, True, True, False)
LIMITS: Mapping[str, tuple[int, int]] = {
    "time_ns": (-(2**62), 2**62),
    "kind": (KEY_DOWN, REFOCUS),
    "code": (0, BUTTONS - 1),
    "dx": (-(2**31), 2**31 - 1),
    "dy": (-(2**31), 2**31 - 1),
}
TYPES = {"time_ns": np.int64, "kind": np.uint8, "code": np.uint8, "dx": np.int32, "dy": np.int32}
KINDS = " (key down, key up, mouse, scroll, unfocus, refocus)"


@dataclass(frozen=True)
class Events:
    """Store a stream of events sorted by time.

    time_ns [E] int64, nanoseconds after raw frame 0 (negative before); kind [E] uint8 (KEY_DOWN …);
    code [E] uint8, the button of key events; dx, dy [E] int32, mouse counts, with the scroll amount
    in dy.
    """

    time_ns: NDArray[np.int64]
    kind: NDArray[np.uint8]
    code: NDArray[np.uint8]
    dx: NDArray[np.int32]
    dy: NDArray[np.int32]

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            column = np.asarray(getattr(self, name))
            if column.ndim != 1 or column.dtype.kind not in "iu":
                raise DataError(
                    f"control events: got {name} of {column.dtype} {column.shape}, expected whole"
                    f" {'nanoseconds' if name == 'time_ns' else 'numbers'} [events]"
                )
            wrong = np.flatnonzero((column < low) | (column > high))
            if len(wrong):
                raise DataError(
                    f"control events: got {name} {column[wrong[0]]} at event {wrong[0]}, expected"
                    f" {low} to {high}{KINDS if name == 'kind' else ''}"
                )
            object.__setattr__(self, name, column.astype(TYPES[name]))
        lengths = {len(getattr(self, name)) for name in LIMITS}
        if len(lengths) > 1:
            raise DataError(
                f"control events: got columns of {sorted(lengths)} events, expected the same number"
                " in each"
            )
        backwards = np.flatnonzero(np.diff(self.time_ns) < 0)
        if len(backwards):
            raise DataError(
                f"control events: got time going back at event {backwards[0] + 1}, expected"
                " ascending times. Fix: sort by time"
            )


def bucket_edges(
    latent_frames: int, fps: Fraction, time: TimeLayout, offset: int = 0
) -> NDArray[np.int64]:
    """Return [T + 1] nanoseconds: bucket t is (edges[t], edges[t + 1]].

    Exact: an event is at or before a time if and only if it is at or before its floor.
    """
    frames = [time.start(t) - 1 + offset for t in range(latent_frames + 1)]
    return np.array(
        [frame * 10**9 * fps.denominator // fps.numerator for frame in frames], dtype=np.int64
    )


def focused(events: Events) -> NDArray[np.bool_]:
    """Return [E], which events happened while the player was in the window: all but those between
    an UNFOCUS and the next REFOCUS."""
    marks = np.isin(events.kind, (UNFOCUS, REFOCUS))
    latest = np.maximum.accumulate(np.where(marks, np.arange(len(marks)), -1))
    return (latest < 0) | (events.kind[np.maximum(latest, 0)] != UNFOCUS)


def unfocused_spans(events: Events) -> int:
    """Return how many times the player left the window."""
    marks = events.kind[np.isin(events.kind, (UNFOCUS, REFOCUS))]
    return int(((marks == UNFOCUS) & (np.insert(marks[:-1], 0, REFOCUS) != UNFOCUS)).sum())


def bucket_events(
    events: Events,
    latent_frames: int,
    fps: Fraction,
    time: TimeLayout,
    keep_taps: bool = False,
    offset: int = 0,
) -> NDArray[np.float32]:
    """Return [T, 259] controls in the order of CONTROL_NAMES.

    Buttons pressed before the first bucket are held until released, or until the player leaves.
    """
    edges, seen = bucket_edges(latent_frames, fps, time, offset), focused(events)
    # -1: before the first bucket; T: after the last
    bucket = np.searchsorted(edges, events.time_ns, side="left") - 1
    out = np.zeros((latent_frames, BUTTONS + 3), np.float32)
    inside = (bucket >= 0) & (bucket < latent_frames) & seen
    for column, kind, amounts in (
        (0, MOUSE, events.dx),
        (1, MOUSE, events.dy),
        (2, SCROLL, events.dy),
    ):
        chosen = inside & (events.kind == kind)
        net = np.zeros(latent_frames, np.int64)
        np.add.at(net, bucket[chosen], amounts[chosen].astype(np.int64))
        out[:, BUTTONS + column] = np.sign(net) if kind == SCROLL else net
    held = np.zeros(BUTTONS, bool)
    keys = np.flatnonzero((events.kind <= KEY_UP) & seen | (events.kind == UNFOCUS))
    position = 0
    for t in range(-1, latent_frames):
        tapped = np.zeros(BUTTONS, bool)
        while position < len(keys) and bucket[keys[position]] <= t:
            code, kind = events.code[keys[position]], events.kind[keys[position]]
            if kind == UNFOCUS:
                held[:] = False
            else:
                held[code] = kind == KEY_DOWN
                tapped[code] |= kind == KEY_DOWN
            position += 1
        if t >= 0:
            out[t, :BUTTONS] = held | tapped if keep_taps else held
    return out


def bucket_controls(
    frames: NDArray[np.float32], sums: tuple[bool, ...], time: TimeLayout, offset: int = 0
) -> NDArray[np.float32]:
    """Combine controls per raw frame [F, A] -> per latent [T, A].

    A latent takes those of the frames that it encodes, moved by `offset`: amounts are summed,
    states averaged. Before the clip nothing is known: no amounts, and the states of its first
    frame.
    """
    count = time.latents(len(frames))
    out = np.empty((count, frames.shape[1]), np.float32)
    for t in range(count):
        group = frames[max(0, time.start(t) + offset) : max(0, time.start(t + 1) + offset)]
        state = group.mean(axis=0) if len(group) else frames[0]
        out[t] = np.where(np.array(sums), group.sum(axis=0), state)
    return out


def control_divisors(
    sums: Sequence[bool], total: NDArray[np.float64], count: int
) -> tuple[float, ...]:
    """Return by what each control is divided when it is read: the root mean square of amounts over
    the training clips, so that motion has the size of a pressed key; 1 for states, and for amounts
    that are always 0. total: sums of squares [A] over `count` latent frames."""
    spread = np.sqrt(total / max(count, 1))
    scaled = np.array(sums, dtype=bool) & (spread > 0)
    return tuple(np.where(scaled, spread, 1.0).tolist())
