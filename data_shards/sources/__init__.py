"""Open sources of clips, which list their clips cheaply and load one at a time.

`encode` does not depend on the kind of source. Another package adds its own by an entry point in
the group `data_shards.sources` that names a function of a `Place`; `kind=<name>` opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from numpy.typing import NDArray

from data_shards.registry import Registry, load
from data_shards.schema import DataError, shown
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip
from data_shards.sources.digests import digest, visible
from data_shards.sources.reading import DEFAULT, Reading
from data_shards.storage.files import read_json


@dataclass(frozen=True)
class Place:
    """Locate a source: its folder; the folder of latents that belong to it; a JSON file {key:
    caption}; its kind, a name of `SOURCES` or auto; and how videos are read."""

    path: str
    latents: str | None = None
    captions: str | None = None
    kind: str = "auto"
    reading: Reading = DEFAULT

    def resolved(self) -> Place:
        """Return the same with absolute paths, for workers that start elsewhere."""
        path, latents, captions = (
            path if path is None or "://" in path else str(Path(path).resolve())
            for path in (self.path, self.latents, self.captions)
        )
        assert path is not None, "it is no option"
        return replace(self, path=path, latents=latents, captions=captions)


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
OF_VIDEOS = ("videos", "webdataset")  # kinds that a `Reading` other than the default applies to


OPTIONAL = ("problems", "libraries", "check", "digests")  # of a source of another package


class Captioned:
    """Wrap a source with captions from a file, which override those of the source."""

    def __init__(self, source: ClipSource, file: Path) -> None:
        self._source, self._file = source, file.name
        self._captions = read_captions(file)
        content = digest(repr(sorted(self._captions.items())).encode())[:16]
        self.description = f"{source.description}, captions {content}"

    @property
    def problems(self) -> dict[str, str]:
        """Return those of the source, and the captions that are of no clip in it."""
        keys = {clip.key for clip in self._source.clips}
        unknown = sorted(self._captions.keys() - keys)
        problems = dict(self._source.problems)
        if unknown:
            some = ", ".join(map(shown, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            problems[self._file] = (
                f"captions: got {len(unknown)} keys that no clip has: {some}, expected the keys of"
                f" clips ({self._file}). Fix: take them out, or correct them"
            )
        return problems

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)  # when asked for: a source may list its clips late

    def load(self, clip: SourceClip) -> ClipContent:
        return self._captioned(clip, self._source.load(clip))

    def check(self, clip: SourceClip) -> ClipContent | None:
        """Return what the source itself checks, with the caption."""
        content = self._source.check(clip)
        return None if content is None else self._captioned(clip, content)

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return those of the source, and that of the clip's own caption."""
        found = dict(self._source.digests(clip))
        if clip.key in self._captions:
            found[self._file] = digest(self._captions[clip.key].encode(errors="surrogatepass"))
        return found

    def _captioned(self, clip: SourceClip, content: ClipContent) -> ClipContent:
        return replace(content, caption=self._captions.get(clip.key, content.caption))

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return what the source itself has under this name."""
        return self._source.array(key, name)


class Completed:
    """Wrap a source of another package that lacks `problems`, `libraries`, `check` or `digests`:
    then nothing is checked beforehand, and a clip has changed when the description has."""

    problems: Mapping[str, str] = MappingProxyType({})
    libraries: tuple[str, ...] = ()

    def __init__(self, source: ClipSource) -> None:
        self._source = source
        for name in OPTIONAL:
            if offers(source, name):
                setattr(self, name, getattr(source, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def check(self, clip: SourceClip) -> ClipContent | None:
        """Return None: what the clip holds is seen when it is loaded."""
        return None

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the source's description."""
        return {"source": self._source.description}


def offers(source: ClipSource, name: str) -> bool:
    """Return True if a source has this attribute, without computing it."""
    return name in vars(source) or hasattr(type(source), name)


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
    kind = detect(place) if place.kind == "auto" else place.kind
    if place.reading.changes() and kind not in OF_VIDEOS:
        raise DataError(
            f"source: got {place.reading.changes()} with a source of the kind {kind}, expected one"
            f" of {', '.join(OF_VIDEOS)}. Fix: leave it out"
        )
    source: ClipSource = load(SOURCES, kind)(place)
    if not all(offers(source, name) for name in OPTIONAL):
        source = cast(ClipSource, Completed(source))
    if place.captions is None:
        return source
    return cast(ClipSource, Captioned(source, Path(place.captions)))


def detect(place: Place) -> str:
    """Return the name of the built-in source for what lies at a place."""
    from data_shards.sources.video_file import SUFFIXES

    folder = Path(place.path)
    tars = folder.is_dir() and any(visible(folder, "*.tar"))
    if tars or (not folder.is_dir() and re.search(r"^pipe:|://|\.tar|\.tgz", place.path)):
        return "webdataset"
    if not folder.exists():
        fix = f"python -m data_shards.record vizdoom out={folder}"
        raise DataError(
            f"source: got {folder}, which does not exist, expected a recording. Fix: {fix}"
        )
    zips = folder.is_dir() and any(visible(folder, "*.zip"))
    if place.latents and not zips:
        raise DataError(
            f"latents: got {place.latents} with {folder}, which holds no zips, expected zips in"
            " both. Fix: leave out latents="
        )
    if (folder / "recording.json").exists():
        return "recording"
    if zips:
        return "latent_zips"
    if folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in visible(folder, "*")):
        return "videos"
    raise DataError(
        f"source: got {folder}, which holds no recording.json and no videos, tars or zips, expected"
        " one of them"
    )
