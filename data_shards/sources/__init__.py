"""Where clips come from. A source lists its clips cheaply and loads one at a time; `encode` does
not care what is behind it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from data_shards.schema import DataError
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip
from data_shards.storage.files import read_json


@dataclass(frozen=True)
class Place:
    """Where a source lies: its folder; the folder of latents that belong to it; a JSON file {key:
    caption}."""

    path: str
    latents: str | None = None
    captions: str | None = None

    def resolved(self) -> Place:
        """The same with absolute paths, for workers that start elsewhere."""
        latents, captions = (
            None if path is None else str(Path(path).resolve())
            for path in (self.latents, self.captions)
        )
        return Place(str(Path(self.path).resolve()), latents, captions)


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
