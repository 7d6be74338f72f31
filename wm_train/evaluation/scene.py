"""Make the map of a clip's scene from its recording: pictures with depth and pose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.recording import RecordingSource
from data_shards.sources.rooms import make_room, room_depth
from data_shards.sources.vizdoom import ROOMS
from data_shards.storage.files import read_json
from wm_train.evaluation.poses import KeyFrames, KnownScene, Surface

EVERY = 4  # frames between key frames
SAME = 1e-3  # metres, and parts of a rotation: float32 poses differ less from what was recorded
FARTHEST = 255  # of recorded depth: it stands for everything beyond


class Recording:
    """Read the scenes of a recording's clips. Raises DataError for a folder that is none."""

    def __init__(self, folder: Path) -> None:
        self._source = RecordingSource(folder)
        facts = read_json(folder / "recording.json", "recording")
        depth = facts["depth_metres"]
        self._scale, self._offset = float(depth["scale"]), float(depth["offset"])
        # e00012 -> 12, which in the scenario `rooms` is the number of the room
        self._episodes = {clip.key: int(clip.episode[1:]) for clip in self._source.clips}
        self._rooms = facts["options"]["scenario"] == ROOMS
        self._seed, self._metres_per_unit = int(facts["options"]["seed"]), facts["metres_per_unit"]

    def scene(self, key: str, c2w: NDArray[np.float64]) -> KeyFrames | None:
        """Return every fourth frame of the clip as a map, in the world of `c2w` [F, 4, 4], a part
        of its path; None for a clip that the recording does not have.

        Raises DataError if the recording's clip of that name has another path.
        """
        if key not in self._episodes:
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
        keep = slice(None, None, EVERY)
        video, depth, recorded, lenses = (x[keep] for x in (video, depth, recorded, lenses))
        surface = None
        if self._rooms:
            surface = self._surface(key, np.linalg.inv(world))
            size = (depth.shape[1], depth.shape[2])
            rows = zip(world @ recorded, lenses, strict=True)
            metres = np.stack([surface(pose, lens, size) for pose, lens in rows])
        else:
            metres = np.where(depth < FARTHEST, depth * self._scale + self._offset, np.nan)
        return KeyFrames(video, metres, world @ recorded, lenses, surface)

    def _surface(self, key: str, from_world: NDArray[np.float64]) -> Surface:
        """Return the exact depth of any view in the room of a clip."""
        room, metres_per_unit = make_room(self._seed, self._episodes[key]), self._metres_per_unit
        return lambda c2w, lens, size: room_depth(
            room, from_world @ c2w, lens, size, metres_per_unit
        )


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
