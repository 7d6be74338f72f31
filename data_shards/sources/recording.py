"""Read a folder made by `python -m data_shards.record` as a source of clips."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError, check_key
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents
from data_shards.storage.files import crc32c, read_file, read_json
from data_shards.storage.npz import read_npy


class RecordingSource:
    """Read the clips of a recording."""

    libraries: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: tuple[str, ...] = ()
        self.stored: StoredLatents | None = None
        self.problems: dict[str, str] = {}
        facts = read_json(folder / "recording.json", "recording")
        try:
            self.fps, self.metres_per_unit = float(facts["fps"]), float(facts["metres_per_unit"])
            buttons, mouse = list(facts["button_names"]), list(facts["mouse_names"])
            self.control_names = tuple(buttons + mouse)
            self.control_sums = (False,) * len(buttons) + (True,) * len(mouse)
            width, height = int(facts["options"]["width"]), int(facts["options"]["height"])
            self._checksums = {clip["key"]: dict(clip["crc32c"]) for clip in facts["clips"]}
            self.clips = tuple(
                SourceClip(
                    check_key(clip["key"]),
                    check_key(clip["episode"]),
                    int(clip["frames"]),
                    height,
                    width,
                )
                for clip in facts["clips"]
            )
            made = f"{facts['source']} {facts['options']}"
            if not (0 < self.fps < math.inf and 0 < self.metres_per_unit < math.inf):
                raise ValueError(f"fps {self.fps:g} or metres_per_unit {self.metres_per_unit:g}")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"recording: {folder / 'recording.json'} lacks or misstates {error}. Fix: record it"
                " again"
            ) from error
        digest = hashlib.sha256(repr(sorted(self._checksums.items())).encode()).hexdigest()[:16]
        self.description = f"recording {made} content {digest}"

    def load(self, clip: SourceClip) -> ClipContent:
        video, c2w, intrinsics, buttons, mouse = (
            self.array(clip.key, name)
            for name in ("video", "c2w", "intrinsics", "buttons", "mouse")
        )
        controls = np.concatenate([buttons.astype(np.float32), mouse.astype(np.float32)], axis=1)
        return ClipContent(video, c2w, intrinsics, controls)

    def check(self, clip: SourceClip) -> ClipContent:
        """Return the content without its video, whose bytes have been compared too."""
        return replace(self.load(clip), video=None)

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the recorded checksums: `load` refuses files that have others."""
        return {
            f"clips/{clip.key}/{name}.npy": f"crc32c {crc}"
            for name, crc in self._checksums[clip.key].items()
        }

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Read one array of a clip (also `depth`), verified.

        Raises:
            DataError: a missing file or one whose bytes are not those recorded.
        """
        path = self.folder / "clips" / key / f"{name}.npy"
        data = read_file(path, "recording")
        if crc32c(data) != self._checksums[key].get(name):
            raise DataError(
                f"recording: got other bytes in {path} than were recorded (clip {key}, {name})."
                " Fix: record again"
            )
        try:
            return read_npy(data, len(data))
        except ValueError as error:
            raise DataError(
                f"recording: cannot read {path} ({error}), expected an array. Fix: record again"
            ) from error


def open_recording(place: Place) -> RecordingSource:
    return RecordingSource(Path(place.path))
