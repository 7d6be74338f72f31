"""Open sources of clips, which list their clips cheaply and load one at a time.

`encode` does not depend on the kind of source. Another package adds its own by an entry point in
the group `data_shards.sources` that names a function of a `Place`; `kind=<name>` opens it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from data_shards.registry import Registry, load
from data_shards.schema import DataError, shown
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip
from data_shards.storage.files import read_json


@dataclass(frozen=True)
class Place:
    """Locate a source: its folder; the folder of latents that belong to it; a JSON file {key:
    caption}; and its kind, a name of `SOURCES` or auto."""

    path: str
    latents: str | None = None
    captions: str | None = None
    kind: str = "auto"

    def resolved(self) -> Place:
        """Return the same with absolute paths, for workers that start elsewhere."""
        path, latents, captions = (
            path if path is None or "://" in path else str(Path(path).resolve())
            for path in (self.path, self.latents, self.captions)
        )
        assert path is not None, "it is no option"
        return Place(path, latents, captions, self.kind)


SOURCES = Registry(
    "kind",
    "data_shards.sources",
    {
        "recording": "data_shards.sources.recording:open_recording",
        "videos": "data_shards.sources.videos:open_videos",
        "latent_zips": "data_shards.sources.latent_zips:open_latent_zips",
        "webdataset": "data_shards.sources.webdataset:open_webdataset",
    },
)


class Captioned:
    """Wrap a source with captions from a file, which override those of the source."""

    def __init__(self, source: ClipSource, file: Path) -> None:
        self._source = source
        self._captions = read_captions(file)
        digest = hashlib.sha256(repr(sorted(self._captions.items())).encode()).hexdigest()[:16]
        self.description = f"{source.description}, captions {digest}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)  # when asked for: a source may list its clips late

    def load(self, clip: SourceClip) -> ClipContent:
        content = self._source.load(clip)
        return replace(content, caption=self._captions.get(clip.key, content.caption))

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return what the source itself has under this name."""
        return self._source.array(key, name)


def read_captions(file: Path) -> dict[str, str]:
    """Read a JSON file {key: caption, or object with `prompt`}.

    Raises:
        DataError: a file that cannot be read, or a caption that is no text.
    """
    captions = {}
    for key, value in read_json(file, "captions").items():
        caption = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(caption, str):
            raise DataError(
                f"captions: got {shown(value)}, expected a text or an object with `prompt` ({file},"
                f" key {shown(key)})"
            )
        captions[key] = caption
    return captions


def open_source(path: str | Place) -> ClipSource:
    """Open the source at a place, of the kind that is named or recognised by its files.

    Raises:
        DataError: nothing there, or nothing known.
    """
    place = Place(path) if isinstance(path, str) else path
    source: ClipSource = load(SOURCES, detect(place) if place.kind == "auto" else place.kind)(place)
    if place.captions is None:
        return source
    return cast(ClipSource, Captioned(source, Path(place.captions)))


def detect(place: Place) -> str:
    """Return the name of the built-in source for what lies at a place."""
    from data_shards.sources.video_file import SUFFIXES

    folder = Path(place.path)
    tars = folder.is_dir() and any(folder.glob("*.tar"))
    if tars or (not folder.is_dir() and re.search(r"^pipe:|://|\.tar|\.tgz", place.path)):
        return "webdataset"
    if not folder.exists():
        fix = f"python -m data_shards.record vizdoom out={folder}"
        raise DataError(
            f"source: got {folder}, which does not exist, expected a recording. Fix: {fix}"
        )
    zips = folder.is_dir() and any(folder.glob("*.zip"))
    if place.latents and not zips:
        raise DataError(
            f"latents: got {place.latents} with {folder}, which holds no zips, expected zips in"
            " both. Fix: leave out latents="
        )
    if (folder / "recording.json").exists():
        return "recording"
    if zips:
        return "latent_zips"
    if folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        return "videos"
    raise DataError(
        f"source: got {folder}, which holds no recording.json and no videos, tars or zips, expected"
        " one of them"
    )
