"""Read what lies beside a video: camera, controls, caption and text, checked against the video.

Their file is read by sidecar.py, a COLMAP model by colmap.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.beside.colmap import read_colmap
from data_shards.beside.sidecar import FACTS, MOST_TEXT, Sidecar, read_sidecar
from data_shards.cameras import camera_problem, square_intrinsics, square_poses
from data_shards.controls import CONTROL_NAMES, CONTROL_SUMS, Events
from data_shards.fields import SAME_RATE
from data_shards.schema import DataError, check_key
from data_shards.storage.files import read_text
from data_shards.storage.npz import open_npz

# a log of inputs ends a little after the recording, and its clock is not that of the video
EVENTS_AFTER_NS = 1e9
Camera = tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None]
Text = tuple[NDArray[np.float32], NDArray[np.uint8]]


@dataclass(frozen=True)
class Beside:
    """Hold what lies beside a video of F frames, checked against it: c2w [F,4,4] in metres,
    intrinsics [F,4], controls [F,A], events, caption, and (embeddings [L,E], mask [L])."""

    c2w: NDArray[np.float64] | None
    intrinsics: NDArray[np.float64] | None
    controls: NDArray[np.float32] | None
    events: Events | None
    caption: str | None
    text: Text | None


def read_camera(sidecar: Sidecar, size: tuple[int, int]) -> Camera:
    """Return (c2w [F,4,4] in metres, intrinsics [F,4]) of a sidecar, or two None.

    size: (height, width) of the pictures.
    """
    where, found = sidecar.where, [key for key in ("c2w", "w2c") if key in sidecar.values]
    if len(found) > 1:
        raise DataError(f"sidecar: got c2w and w2c, expected one of them ({where})")
    if not found:
        if "intrinsics" in sidecar.values:
            raise DataError(
                f"sidecar: got intrinsics without poses, expected both ({where}). Fix: add c2w"
            )
        return None, None
    if "intrinsics" not in sidecar.values:
        raise DataError(f"sidecar: got poses without intrinsics, expected both ({where})")
    poses = sidecar.numbers(found[0], "[F, 4, 4] or [F, 3, 4]")
    c2w = square_poses(poses, found[0] == "w2c", f"{found[0]} in {where}")
    values = sidecar.numbers("intrinsics", "[4], [F, 4], [3, 3] or [F, 3, 3]")
    intrinsics = square_intrinsics(values, len(c2w), where)
    return checked_camera(c2w, intrinsics, sidecar.metres_per_unit, size, where)


def checked_camera(
    c2w: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    metres_per_unit: float,
    size: tuple[int, int],
    where: str,
) -> Camera:
    """Return the camera in metres, if it can be that of pictures of this size."""
    c2w = c2w.copy()
    c2w[:, :3, 3] *= metres_per_unit
    if problem := camera_problem(c2w, intrinsics, *size):
        raise DataError(f"{problem} ({where}). Fix: see units and order; pixels, metres")
    return c2w, intrinsics


def read_controls(sidecar: Sidecar) -> NDArray[np.float32] | None:
    """Return controls [F, A] of a sidecar with names for them, or None."""
    names = sidecar.control_names
    if "controls" not in sidecar.values:
        if names or "control_sums" in sidecar.values:
            raise DataError(
                f"sidecar: got names or sums without controls, expected both ({sidecar.where})."
                " Fix: add controls [F, A]"
            )
        return None
    rule = f"[F, {len(names)}] as control_names"
    controls = sidecar.numbers("controls", rule)
    if controls.ndim != 2 or controls.shape[1] != len(names) or not names:
        raise DataError(
            f"sidecar: got controls {controls.shape}, expected {rule} ({sidecar.where}). Fix: name"
            " every control"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = controls.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise sidecar.error("controls", "numbers that float32 can hold")
    return narrow


def read_embedding(sidecar: Sidecar) -> Text | None:
    """Return the ready-made text of a sidecar: (embeddings [L,E], mask [L]), or None."""
    if ("text" in sidecar.values) != ("text_mask" in sidecar.values):
        raise DataError(
            f"sidecar: got text without text_mask or the reverse, expected both ({sidecar.where})"
        )
    if "text" not in sidecar.values:
        return None
    text, mask = sidecar.numbers("text", "[L, E]"), sidecar.numbers("text_mask", "[L] of 0 and 1")
    if text.ndim != 2 or 0 in text.shape:
        raise sidecar.error("text", "[L, E]")
    if mask.shape != text.shape[:1] or not np.isin(mask, (0, 1)).all():
        raise sidecar.error("text_mask", f"[{len(text)}] of 0 and 1")
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = text.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise sidecar.error("text", "numbers that float32 can hold")
    return narrow, mask.astype(np.uint8)


def read_caption(path: Path, sidecar: Sidecar) -> str | None:
    """Return the text of name.txt, or of the sidecar."""
    if path.exists():
        caption = read_text(path, "caption").strip()
        if len(caption) > MOST_TEXT:
            raise DataError(
                f"caption: got {len(caption)} characters in {path.name}, expected at most"
                f" {MOST_TEXT}"
            )
        return caption
    return sidecar.words("caption") if "caption" in sidecar.values else None


def read_events(path: Path, frames: int, fps: float) -> Events | None:
    """Return the events of a video of so many frames from name.events.npz, or None.

    Raises:
        DataError: columns that are missing or wrong, or times of another clock.
    """
    if not path.exists():
        return None
    columns = ("time_ns", "kind", "code", "dx", "dy")
    with open_npz(path, path.name, "control events") as file:
        read = [file.read(name) for name in columns]
    try:
        events = Events(*read)
    except DataError as error:
        raise DataError(f"{error} ({path.name})") from error
    end = frames / fps * 1e9 if fps > 0 else np.inf
    if len(events.time_ns) and events.time_ns[0] > end:
        raise DataError(
            f"control events: got a first one {events.time_ns[0] / 1e9:.6g} s after frame 0,"
            f" expected some within the video's {end / 1e9:.6g} s ({path.name}). Fix: time_ns"
            " counts nanoseconds from frame 0"
        )
    if len(events.time_ns) and events.time_ns[-1] > end * (1 + SAME_RATE) + EVENTS_AFTER_NS:
        raise DataError(
            f"control events: got a last one {events.time_ns[-1] / 1e9:.6g} s after frame 0,"
            f" expected all within the video's {end / 1e9:.6g} s, or soon after it ({path.name})."
            " Fix: take those of this video, from its first frame to its last"
        )
    return events


def read_listed(video: Path) -> tuple[str, float, tuple[str, ...], tuple[bool, ...]]:
    """Return what a source says of a clip before it is loaded: its episode, metres_per_unit, and
    names and sums of its controls."""
    sidecar = read_sidecar(video, FACTS)
    episode = sidecar.episode
    names, sums = sidecar.control_names, sidecar.control_sums
    if video.with_suffix(".events.npz").exists():
        if names or "controls" in sidecar.names:
            raise DataError(
                f"sidecar: got controls in {sidecar.where} and {video.stem}.events.npz, expected"
                " one of them"
            )
        names, sums = CONTROL_NAMES, CONTROL_SUMS
    key = check_key(video.stem if episode is None else episode)
    return key, sidecar.metres_per_unit, names, sums


def read_beside(video: Path, frames: int, size: tuple[int, int], fps: float) -> Beside:
    """Read all that lies beside a video, and check it against its number of frames and their size
    (height, width).

    Raises:
        DataError: a file that cannot be read, or facts of another clip.
    """
    sidecar, colmap = read_sidecar(video), video.with_suffix(".colmap")
    if colmap.exists():
        if doubled := sorted({"c2w", "w2c", "intrinsics"} & set(sidecar.values)):
            raise DataError(
                f"sidecar: got {colmap.name} and {doubled[0]} in {sidecar.where}, expected one of"
                " them"
            )
        c2w, intrinsics = checked_camera(
            *read_colmap(colmap, frames, size), sidecar.metres_per_unit, size, colmap.name
        )
    else:
        c2w, intrinsics = read_camera(sidecar, size)
    controls = read_controls(sidecar)
    for what, rows in (("poses", c2w), ("controls", controls)):
        check_count(what, rows, frames, sidecar.where)
    return Beside(
        c2w,
        intrinsics,
        controls,
        read_events(video.with_suffix(".events.npz"), frames, fps),
        read_caption(video.with_suffix(".txt"), sidecar),
        read_embedding(sidecar),
    )


def check_count(what: str, rows: NDArray[Any] | None, frames: int, where: str) -> None:
    """Raise DataError unless there is one row for each frame of the video."""
    if rows is not None and len(rows) != frames:
        raise DataError(
            f"sidecar: got {what} for {len(rows)} frames, expected one for each of the video's"
            f" {frames} ({where}). Fix: write them for this video, all its frames"
        )
