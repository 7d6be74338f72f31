"""Where clips come from. A source lists its clips cheaply and loads one at a time; `encode` does
not care what is behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import Events
from data_shards.schema import DataError
from data_shards.storage.files import read_json


@dataclass(frozen=True)
class SourceClip:
    """What is known of a clip before it is read. `episode`: clips of one episode go to the same
    side of the validation split."""

    key: str
    episode: str
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ClipContent:
    """video [F,H,W,3] uint8, or, from a source of ready latents, latents [T,C,h,w]; c2w [F,4,4] in
    metres, OpenCV axes; intrinsics [F,4] fx, fy, cx, cy in pixels; frame_controls [F,A] float32:
    row i holds what happened between frames i-1 and i (row 0: nothing); or, finer than frames,
    `events`; the caption; or the text ready made: (embeddings [L,E], mask [L] uint8). All but the
    first may be absent."""

    video: NDArray[np.uint8] | None
    c2w: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    frame_controls: NDArray[np.float32] | None = None
    events: Events | None = None
    latents: NDArray[np.float32] | None = None
    caption: str | None = None
    text: tuple[NDArray[Any], NDArray[np.uint8]] | None = None


@dataclass(frozen=True)
class StoredLatents:
    """The codec behind a source of ready latents: a `LatentCodec` that knows the layout and needs
    no weights."""

    name: str
    channels: int
    temporal_stride: int
    spatial_stride: int
    options: Mapping[str, Any]

    def encode(self, video: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise DataError(
            "source: got latents without their videos, expected videos to encode from. Fix:"
            " image_latents_every=0"
        )

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        raise AssertionError("nothing is decoded while ready latents are taken over")


class ClipSource(Protocol):
    notes: tuple[str, ...]  # what `encode` should tell the user, say about frames left out
    description: str  # goes into dataset.json; must not name folders of one machine
    fps: float
    metres_per_unit: float
    control_names: tuple[str, ...]
    control_sums: tuple[
        bool, ...
    ]  # per control: True = amounts that add up (mouse motion), False = states, which are averaged
    clips: tuple[SourceClip, ...]
    stored: StoredLatents | None  # set where clips come as latents

    def load(self, clip: SourceClip) -> ClipContent: ...

    def array(self, key: str, name: str) -> NDArray[Any]: ...  # more of a clip: encode fields=


@dataclass(frozen=True)
class Place:
    """Where a source lies: its folder; the folder of latents that belong to it; a JSON file {key:
    caption}."""

    path: str
    latents: str | None = None
    captions: str | None = None

    def resolved(self) -> Place:
        """The same with absolute paths, for workers that start elsewhere."""
        return Place(
            *(
                None if path is None else str(Path(path).resolve())
                for path in (self.path, self.latents, self.captions)
            )
        )  # type: ignore[arg-type]


class Captioned:
    """A source with captions from a file; they go before those that the source has itself."""

    def __init__(self, source: ClipSource, file: Path) -> None:
        captions = read_json(file, "captions")
        self._source = source
        self._captions = {
            key: str(value["prompt"] if isinstance(value, dict) else value)
            for key, value in captions.items()
        }
        digest = hashlib.sha256(repr(sorted(self._captions.items())).encode()).hexdigest()[:16]
        self.description, self.notes = f"{source.description}, captions {digest}", source.notes
        self.fps, self.metres_per_unit = source.fps, source.metres_per_unit
        self.control_names, self.control_sums = source.control_names, source.control_sums
        self.clips, self.stored = source.clips, source.stored

    def load(self, clip: SourceClip) -> ClipContent:
        content = self._source.load(clip)
        return replace(content, caption=self._captions.get(clip.key, content.caption))

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return what the source itself has under this name."""
        return self._source.array(key, name)


def open_source(path: str | Place) -> ClipSource:
    """The source behind a path, told by what lies there.

    Raises:
        DataError: nothing there, or nothing known.
    """
    place = Place(path) if isinstance(path, str) else path
    source = _open_folder(Path(place.path), place.latents)
    return source if place.captions is None else Captioned(source, Path(place.captions))


def _open_folder(folder: Path, latents: str | None) -> ClipSource:
    from data_shards.sources.latent_zips import LatentZipsSource
    from data_shards.sources.recording import RecordingSource
    from data_shards.sources.videos import SUFFIXES, VideosSource

    if not folder.exists():
        fix = f"python -m data_shards.record vizdoom out={folder}"
        raise DataError(
            f"source: got {folder}, which does not exist, expected a recording. Fix: {fix}"
        )
    zips = folder.is_dir() and any(folder.glob("*.zip"))
    if latents and not zips:
        raise DataError(
            f"latents: got {latents} with {folder}, which holds no zips, expected zips in both."
            " Fix: leave out latents="
        )
    if (folder / "recording.json").exists():
        return RecordingSource(folder)
    if zips:
        if not latents:
            raise DataError(
                f"latents: got none for the zips in {folder}, expected the folder with their"
                " latents. Fix: latents=<folder>"
            )
        return LatentZipsSource(folder, Path(latents))
    if folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return VideosSource(folder)
    raise DataError(
        f"source: got {folder}, which holds no recording.json and no videos or zips, expected one"
        " of them"
    )
