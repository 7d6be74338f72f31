"""Convert controller events to one control row per latent frame (Waypoint-1.5 §7.2).

Events of up to 10 kHz (key down, key up, mouse motion, scroll) are cut into buckets at the latent
rate. A row is a snapshot at the time of the latest raw frame that its latent encodes: the state of
256 buttons, the net mouse displacement since the last snapshot, and the sign of the net scroll
since then. An event at the exact time of a snapshot belongs to it, so every event is in exactly one
bucket: bucket 0 is (-1/fps, 0] before raw frame 0, bucket t is (r (t-1) / fps, r t / fps]. A key
pressed and released inside one bucket is missed by a snapshot, as in the paper; with `keep_taps` it
counts as held there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError, latent_frame_count

KEY_DOWN, KEY_UP, MOUSE, SCROLL = range(4)
BUTTONS = 256
CONTROL_NAMES = (
    *(f"button_{code:03d}" for code in range(BUTTONS)),
    "mouse_dx",
    "mouse_dy",
    "scroll_sign",
)
LIMITS: Mapping[str, tuple[int, int]] = {
    "time_ns": (-(2**62), 2**62),
    "kind": (KEY_DOWN, SCROLL),
    "code": (0, BUTTONS - 1),
    "dx": (-(2**31), 2**31 - 1),
    "dy": (-(2**31), 2**31 - 1),
}
TYPES = {"time_ns": np.int64, "kind": np.uint8, "code": np.uint8, "dx": np.int32, "dy": np.int32}
KINDS = " (key down, key up, mouse, scroll)"


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


def bucket_edges(latent_frames: int, fps: Fraction, temporal_stride: int) -> NDArray[np.int64]:
    """Return [T + 1] nanoseconds: bucket t is (edges[t], edges[t + 1]].

    Exact: an event is at or before a time if and only if it is at or before its floor.
    """
    frames = [-1, *(temporal_stride * t for t in range(latent_frames))]
    return np.array(
        [frame * 10**9 * fps.denominator // fps.numerator for frame in frames], dtype=np.int64
    )


def bucket_events(
    events: Events, latent_frames: int, fps: Fraction, temporal_stride: int, keep_taps: bool = False
) -> NDArray[np.float32]:
    """Return [T, 259] controls in the order of CONTROL_NAMES.

    Buttons pressed before the first bucket are held until released.
    """
    edges = bucket_edges(latent_frames, fps, temporal_stride)
    # -1: before the first bucket; T: after the last
    bucket = np.searchsorted(edges, events.time_ns, side="left") - 1
    out = np.zeros((latent_frames, BUTTONS + 3), np.float32)
    inside = (bucket >= 0) & (bucket < latent_frames)
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
    keys = np.flatnonzero(events.kind <= KEY_UP)
    position = 0
    for t in range(-1, latent_frames):
        tapped = np.zeros(BUTTONS, bool)
        while position < len(keys) and bucket[keys[position]] <= t:
            code, down = events.code[keys[position]], events.kind[keys[position]] == KEY_DOWN
            held[code] = down
            tapped[code] |= down
            position += 1
        if t >= 0:
            out[t, :BUTTONS] = held | tapped if keep_taps else held
    return out


def bucket_controls(
    frames: NDArray[np.float32], sums: tuple[bool, ...], stride: int
) -> NDArray[np.float32]:
    """Combine controls per raw frame [F, A] -> per latent [T, A].

    Latent t > 0 takes the frames that it encodes; amounts are summed, states averaged.
    """
    count = latent_frame_count(len(frames), stride)
    out = np.zeros((count, frames.shape[1]), np.float32)
    out[0] = frames[0]
    groups = frames[1:].reshape(count - 1, stride, frames.shape[1])
    out[1:] = np.where(np.array(sums), groups.sum(axis=1), groups.mean(axis=1))
    return out
