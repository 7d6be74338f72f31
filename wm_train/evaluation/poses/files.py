"""Read a camera path from a file: npz, or TUM's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError


def read_path(file: Path, frames: int, fps: float) -> tuple[NDArray[np.float64], bool]:
    """Return c2w [F, 4, 4], NaN where the file has no pose for a frame, and if it is metric.

    An npz holds `c2w` [n, 4, 4] or [n, 3, 4], and may hold `frames` [n], the frame of each row, and
    `metric`, true for poses in metres. TUM: lines `seconds tx ty tz qx qy qz qw`, c2w. Raises
    DataError for anything else.
    """
    try:
        rows, numbers, metric = (
            read_npz(file) if file.suffix == ".npz" else (*read_tum(file.read_text(), fps), False)
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"poses: got {file} ({error}), expected an npz with c2w [F, 4, 4], or TUM lines"
            " `seconds tx ty tz qx qy qz qw`"
        ) from error
    if len(numbers) != len(rows) or (
        len(numbers) and not 0 <= numbers.min() <= numbers.max() < frames
    ):
        raise DataError(
            f"poses: got {len(rows)} poses of frames {numbers.tolist()[:3]}... in {file}, expected"
            f" one for each frame from 0 to {frames - 1} at most"
        )
    path = np.full((frames, 4, 4), np.nan)
    path[numbers] = rows
    return path, metric


def read_npz(file: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], bool]:
    """Return poses [n, 4, 4], the frame of each, and if they are metric."""
    with np.load(file, allow_pickle=False) as held:
        given = np.asarray(held["c2w"], np.float64)
        numbers = np.asarray(held["frames"] if "frames" in held else np.arange(len(given)))
        metric = bool(held["metric"]) if "metric" in held else False
    if given.ndim != 3 or given.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"c2w of shape {given.shape}")
    rows = np.tile(np.eye(4), (len(given), 1, 1))
    rows[:, :3] = given[:, :3]
    return rows, numbers.astype(np.int64), metric


def read_tum(text: str, fps: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return poses [n, 4, 4] and the frame at each time stamp."""
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    table = np.array([[float(word) for word in line.split()] for line in lines], np.float64)
    if table.ndim != 2 or table.shape[1] != 8:
        raise ValueError(f"lines of {table.shape[1:]} numbers, expected 8")
    x, y, z, w = (table[:, 4:] / np.linalg.norm(table[:, 4:], axis=1, keepdims=True)).T
    rows = np.tile(np.eye(4), (len(table), 1, 1))
    rows[:, :3, :3] = np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1),
            np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1),
            np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1),
        ],
        axis=1,
    )
    rows[:, :3, 3] = table[:, 1:4]
    return rows, np.round(table[:, 0] * fps).astype(np.int64)
