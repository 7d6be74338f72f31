"""Where clips come from. A source lists its clips cheaply and loads one at a time; `encode` does not care what is behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import Events
from data_shards.schema import DataError


@dataclass(frozen=True)
class SourceClip:
    """What is known of a clip before it is read. `episode`: clips of one episode go to the same side of the validation split."""

    key: str
    episode: str
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipContent:
    """video [F,H,W,3] uint8; c2w [F,4,4] in metres, OpenCV axes; intrinsics [F,4] fx, fy, cx, cy in pixels; frame_controls [F,A] float32:
    row i holds what happened between frames i-1 and i (row 0: nothing); or, finer than frames, `events`. All but the video may
    be absent."""

    video: NDArray[np.uint8]
    c2w: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    frame_controls: NDArray[np.float32] | None = None
    events: Events | None = None


class ClipSource(Protocol):
    notes: tuple[str, ...]  # what `encode` should tell the user, say about frames left out
    description: str  # goes into dataset.json; must not name folders of one machine
    fps: float
    metres_per_unit: float
    control_names: tuple[str, ...]
    control_sums: tuple[bool, ...]  # per control: True = amounts that add up (mouse motion), False = states, which are averaged
    clips: tuple[SourceClip, ...]

    def load(self, clip: SourceClip) -> ClipContent: ...


def open_source(path: str) -> ClipSource:
    """The source behind a path, told by what lies there.

    Raises:
        DataError: nothing there, or nothing known.
    """
    from data_shards.sources.recording import RecordingSource
    from data_shards.sources.videos import SUFFIXES, VideosSource

    folder = Path(path)
    if not folder.exists():
        fix = f"python -m data_shards.record vizdoom out={path}"
        raise DataError(f"source: got {path}, which does not exist, expected a recording. Fix: {fix}")
    if (folder / "recording.json").exists():
        return RecordingSource(folder)
    if folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return VideosSource(folder)
    raise DataError(f"source: got {path}, which holds no recording.json and no videos, expected a recording or a folder of videos")
