"""Read a folder of video files as a source of clips, with poses, intrinsics and controls.

These are in a file beside `name.mp4`, `name.npz` or `name.json` (same keys; npz without pickles):

    c2w or w2c   [F, 4, 4] or [F, 3, 4], OpenCV axes (+x right, +y down, +z forward), in metres
                 (or units of `metres_per_unit`)
    intrinsics   [4] or [F, 4] fx, fy, cx, cy in pixels of the video, or a 3x3 matrix [3, 3] or
                 [F, 3, 3]
    controls     [F, A] per raw frame, with `control_names` [A] and optionally `control_sums` [A]
                 (true: amounts that add up over frames)
    caption      text that describes the scene; or it is the content of `name.txt`
    text         [L, E] ready-made embeddings of it, with text_mask [L] (1 at real tokens), for
                 `encode text=ready`
    episode      name of the source video: clips of one episode go to the same side of the
                 validation split (default: the clip's own name)

F counts all frames of the video. Other keys are refused. Instead of c2w and intrinsics there may be
a COLMAP text model of the video's frames in the folder `name.colmap` (cameras.txt, images.txt; see
beside/colmap.py); instead of controls, `name.events.npz` with the columns of
`data_shards.controls.Events`. Either every clip has poses or none has; the same for controls.
Frames after the last multiple of 8 plus 1 are left out, with a note.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_shards.beside.sidecar import read_sidecar
from data_shards.beside.video import read_beside, read_listed
from data_shards.schema import MAX_MEMBER_BYTES, DataError, check_key
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents
from data_shards.sources.video_file import LENGTHS, SUFFIXES, probe, read_frames, whole_groups


class VideosSource:
    """Read clips from a folder of video files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: StoredLatents | None = None
        self._files = {
            check_key(file.stem): file
            for file in sorted(folder.iterdir())
            if file.suffix.lower() in SUFFIXES
        }
        clips, rates, trimmed = [], set(), 0
        names: set[tuple[str, ...]] = set()
        sums_of: set[tuple[bool, ...]] = set()
        scales = set()
        self._counts: dict[str, int] = {}  # of all frames, also of those that are left out
        for key, file in self._files.items():
            frames, height, width, rate = probe(str(file), file.name)
            episode, scale, found, sums = read_listed(file)
            kept = whole_groups(frames)
            trimmed += frames - kept
            rates.add(rate)
            self._counts[key] = frames
            clips.append(SourceClip(key, episode, kept, height, width))
            scales.add(scale)
            names.add(found)
            sums_of.add(sums)
        for what, values in (
            ("frame rates", rates),
            ("control names", names),
            ("control sums", sums_of),
            ("metres_per_unit", scales),
        ):
            if len(values) > 1:
                raise DataError(
                    f"videos: got different {what} {sorted(values)[:3]} in {folder}, expected one."
                    " Fix: encode them separately"
                )
        self.clips, self.control_sums = tuple(clips), next(iter(sums_of), ())
        self.fps, self.control_names = (
            (float(next(iter(rates))), next(iter(names))) if clips else (0.0, ())
        )
        self.metres_per_unit = next(iter(scales), 1.0)
        note = f"{trimmed} frames at the ends of clips are left out: {LENGTHS}"
        alone = sorted(
            file.name
            for file in folder.iterdir()
            if file.suffix in (".npz", ".colmap")
            and file.name.removesuffix(".npz").removesuffix(".events").removesuffix(".colmap")
            not in self._files
        )
        unused = f"{len(alone)} sidecars belong to no video: {', '.join(alone[:5])}"
        self.notes: tuple[str, ...] = (*((note,) if trimmed else ()), *((unused,) if alone else ()))
        # the files themselves, by size and time: an edited video makes another data set, and an
        # interrupted run does not go on with it
        facts = [
            (key, file.stat().st_size, file.stat().st_mtime_ns) for key, file in self._files.items()
        ]
        self.description = (
            f"videos, {len(clips)} files, content"
            f" {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
        )

    def load(self, clip: SourceClip) -> ClipContent:
        file, frames = self._files[clip.key], clip.frames
        size = clip.height, clip.width
        beside = read_beside(file, self._counts[clip.key], size, self.fps)
        return ClipContent(
            read_frames(str(file), clip, file.name),
            None if beside.c2w is None else beside.c2w[:frames],
            None if beside.intrinsics is None else beside.intrinsics[:frames],
            None if beside.controls is None else beside.controls[:frames],
            beside.events,
            caption=beside.caption,
            text=beside.text,
        )

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return an array of the clip's sidecar.

        Raises:
            DataError: a sidecar without it.
        """
        sidecar = read_sidecar(self._files[key], (name,), MAX_MEMBER_BYTES)
        if name not in sidecar.values:
            raise DataError(
                f"sidecar: got no {name}, expected it for every clip (key {key}). Fix: add it, or"
                " encode without fields="
            )
        return sidecar.array(name)


def open_videos(place: Place) -> VideosSource:
    return VideosSource(Path(place.path))
