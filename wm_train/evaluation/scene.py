"""Make the map of a clip's scene from its recording: pictures with depth and pose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.recording import RecordingSource
from data_shards.storage.files import read_json
from wm_train.evaluation.poses import KeyFrames, KnownScene

EVERY = 4  # frames between key frames
SAME = 1e-3  # metres, and parts of a rotation: float32 poses differ less from what was recorded
FARTHEST = 255  # of recorded depth: it stands for everything beyond


class Recording:
    """Read the scenes of a recording's clips. Raises DataError for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        self._source = RecordingSource(folder)
        facts = read_json(folder / "recording.json", "recording")
        self._clips = {clip.key for clip in self._source.clips}
        depth = facts["depth_metres"]
        self._scale, self._offset = float(depth["scale"]), float(depth["offset"])

    def scene(self, key: str, c2w: NDArray[np.float64]) -> KeyFrames | None:
        """Return every fourth frame of the clip as a map, in the world of `c2w` [F, 4, 4], a part
        of its path; None for a clip that the recording does not have.

        Raises DataError if the recording's clip of that name has another path.
        """
        if key not in self._clips:
            return None
        video, depth, recorded, lenses = (
            self._source.array(key, name) for name in ("video", "depth", "c2w", "intrinsics")
        )
        start = place_of(recorded, c2w)
        if start is None:
            raise DataError(
                f"recording: got clip {key} with another path than the data set's, expected the"
                " recording that it was encoded from. Fix: recording=<that folder>"
            )
        world = c2w[0] @ np.linalg.inv(recorded[start])
        metres = np.where(depth < FARTHEST, depth * self._scale + self._offset, np.nan)
        keep = slice(None, None, EVERY)
        return KeyFrames(video[keep], metres[keep], (world @ recorded)[keep], lenses[keep])


def place_of(whole: NDArray[np.float64], part: NDArray[np.float64]) -> int | None:
    """Return the frame of path `whole` at which `part` begins, None if nowhere."""
    wanted = np.linalg.inv(part[0]) @ part
    for start in range(len(whole) - len(part) + 1):
        here = np.linalg.inv(whole[start]) @ whole[start : start + len(part)]
        if np.abs(here - wanted).max() < SAME:
            return start
    return None


def known_scene(
    recording: Recording | None, key: str, c2w: NDArray[np.float64], intrinsics: NDArray[np.float64]
) -> KnownScene:
    """Return all that an estimator may know of a clip."""
    frames = None if recording is None else recording.scene(key, c2w)
    return KnownScene(key, intrinsics, c2w[0], frames)
