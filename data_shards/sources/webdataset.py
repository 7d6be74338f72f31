"""Read published tars of videos in the WebDataset layout as a source of clips.

`source=shards/{000000..000099}.tar` (braces as in a shell), one tar, a folder of them, or URLs of
any store that fsspec opens. A clip is the members whose names agree up to the first dot of the file
name:

    <key>.mp4 | .webm | .mkv | .mov | .avi   the video
    <key>.txt                                its caption
    <key>.json                               `caption` (where there is no .txt), `episode`, c2w or
                                             w2c with intrinsics and metres_per_unit, text with
                                             text_mask: as beside a video in a folder (see
                                             videos.py)

Clips are called `<tar>/<key>`; their keys in the data set are the same, with `_` for characters
that a key cannot have and a hash at the end. Members of other kinds and keys without a video are
left out, with a note.

Tars are listed here, not by the webdataset library. For that library (and for `tarfile`) a tar that
was cut between two members, or has a damaged header, ends without an error; a duplicate key becomes
two samples; one clip is reached only by reading all before it, and `pipe:` commands are run. A
listing here reads headers and skips the videos; a clip is then one range of bytes, wherever it is
read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data_shards.beside.sidecar import Sidecar
from data_shards.beside.video import check_count, read_camera, read_embedding
from data_shards.schema import DataError
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents
from data_shards.sources.cuts import cut_rows
from data_shards.sources.digests import digest, visible
from data_shards.sources.reading import DEFAULT, LENGTHS, Reading, common_rate
from data_shards.sources.tar_listing import TarClip, TarList, list_tar, read_caption, read_facts
from data_shards.sources.video_file import SUFFIXES, check_whole, count_packets, import_av
from data_shards.sources.video_reader import VideoReader
from data_shards.storage.remote import RetryPolicy, connect, fetch, must_be_file, with_retries

POLICY = RetryPolicy(read_timeout_s=60.0)
READ_AHEAD = 2**18
STATED = ("ETag", "generation", "md5Hash")  # by stores, of an object's content
TOGETHER = 16  # tars listed at a time: a listing waits for the store


class WebDatasetSource:
    libraries = ("av",)

    def __init__(self, urls: Sequence[str], reading: Reading = DEFAULT) -> None:
        self.reading = reading
        if reading.clip_frames is not None:
            raise DataError(
                f"clip_frames: got {reading.clip_frames} with tars of videos, expected none: each"
                " clip would fetch its whole video again. Fix: unpack the tars into a folder"
            )
        self.stored: StoredLatents | None = None
        self.metres_per_unit = 1.0
        self.control_names: tuple[str, ...] = ()
        self.control_sums: tuple[bool, ...] = ()
        self._tars = {
            name: open_store(url, name) for name, url in zip(tar_names(urls), urls, strict=True)
        }
        with ThreadPoolExecutor(TOGETHER) as pool:
            facts = list(pool.map(lambda name: tar_facts(name, *self._tars[name]), self._tars))
        self._facts = dict(zip(self._tars, facts, strict=True))
        content = digest(repr([told_by(*item) for item in self._facts.items()]).encode())[:16]
        asked = f", {reading.changes()}" if reading.changes() else ""
        self.description = f"webdataset, {len(facts)} tars{asked}, content {content}"

    def _list(self, tar: str) -> TarList:
        filesystem, path = self._tars[tar]

        def attempt() -> TarList:
            # a store's own read-ahead, of 50 MB in S3, would fetch the videos between the headers
            with filesystem.open(path, "rb", block_size=READ_AHEAD) as file:
                return list_tar(file, tar, self.reading)

        with named(tar):
            return with_retries(attempt, POLICY)

    @cached_property
    def _listed(self) -> TarList:
        def attempt(tar: str) -> TarList | DataError:
            try:
                return self._list(tar)
            except DataError as error:
                return error

        import_av()  # a fault of the installation is no fault of the files
        with ThreadPoolExecutor(TOGETHER) as pool:
            found = list(pool.map(attempt, self._tars))
        if wrong := [item for item in found if isinstance(item, DataError)]:
            raise DataError("\n".join(map(str, wrong)), all(error.passing for error in wrong))
        listed = [item for item in found if isinstance(item, TarList)]
        clips = [clip for tar in listed for clip in tar.clips]
        problems = {name: why for tar in listed for name, why in tar.problems.items()}
        if clips and self.reading.fps is None:
            try:
                common_rate([clip.facts.times.rate for clip in clips])
            except DataError as error:
                raise DataError("\n".join([*problems.values(), str(error)])) from None
        return TarList(clips, [name for tar in listed for name in tar.left_out], problems)

    @property
    def clips(self) -> tuple[SourceClip, ...]:
        return tuple(self._listed.clips)

    @property
    def problems(self) -> dict[str, str]:
        return self._listed.problems

    @property
    def notes(self) -> tuple[str, ...]:
        clips, left_out = self._listed.clips, self._listed.left_out
        notes = []
        if trimmed := sum(clip.trimmed for clip in clips):
            notes.append(f"{trimmed} frames at the ends of clips are left out: {LENGTHS}")
        if left_out:
            shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            notes.append(f"{len(left_out)} members or clips are left out: {shown}")
        return tuple(notes)

    @cached_property
    def fps(self) -> float:
        """Return the frame rate of the first clip; workers list no more than its tar."""
        if self.reading.fps is not None:
            return float(self.reading.fps)
        first = next((clip for tar in self._tars for clip in self._list(tar).clips), None)
        return float(first.facts.times.rate) if first else 0.0

    def load(self, clip: SourceClip) -> ClipContent:
        assert isinstance(clip, TarClip), "it is one of ours"
        parts = {suffix: (start, size) for suffix, start, size in clip.members}
        suffix = next(suffix for suffix in parts if f".{suffix}" in SUFFIXES)
        data = io.BytesIO(self._read(clip, *parts[suffix]))
        reader = VideoReader(data, clip.facts, clip.name, damaged=self.reading.damaged)
        video = reader.read(self._numbers(clip))
        reader.close()
        return replace(self._beside(clip), video=video)

    def check(self, clip: SourceClip) -> ClipContent:
        """Return what lies beside the video; one on a disk must hold all packets of the clip. That
        would fetch a video from a store twice, so there it is seen when the clip is loaded."""
        assert isinstance(clip, TarClip), "it is one of ours"
        if self._is_local(clip.tar) and self.reading.damaged == "refuse":
            parts = {suffix: (start, size) for suffix, start, size in clip.members}
            suffix = next(suffix for suffix in parts if f".{suffix}" in SUFFIXES)
            data = io.BytesIO(self._read(clip, *parts[suffix]))
            check_whole(count_packets(data, clip.name), clip.facts.times.frames, clip.name)
        return self._beside(clip)

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the digests of the clip's members; of a tar in a store that states a hash or a
        generation of the object, that of the tar, so that nothing is fetched."""
        assert isinstance(clip, TarClip), "it is one of ours"
        stated = [self._facts[clip.tar].get(name) for name in STATED]
        if not self._is_local(clip.tar) and any(stated):
            return {f"{clip.tar}.tar": digest(repr((stated, clip.members)).encode())}
        return {
            f"{clip.name}.{suffix}": digest(self._read(clip, start, size))
            for suffix, start, size in clip.members
        }

    def _is_local(self, tar: str) -> bool:
        return isinstance(self._tars[tar][0], LocalFileSystem)

    def _numbers(self, clip: TarClip) -> NDArray[np.int64]:
        """Return the numbers of a clip's frames in its video."""
        return clip.facts.times.shown(self.reading.fps)[: clip.frames]

    def _beside(self, clip: TarClip) -> ClipContent:
        """Return all of a clip but its pixels."""
        parts = {suffix: (start, size) for suffix, start, size in clip.members}
        facts = Sidecar(clip.name)
        if "json" in parts:
            facts = read_facts(self._read(clip, *parts["json"]), clip.name)
        caption = facts.words("caption") if "caption" in facts.values else None
        if "txt" in parts:
            caption = read_caption(self._read(clip, *parts["txt"]), clip.name)
        c2w, intrinsics = read_camera(facts, (clip.height, clip.width))
        check_count("poses", c2w, clip.facts.times.frames, facts.where)
        numbers = self._numbers(clip)
        return ClipContent(
            None,
            cut_rows(c2w, numbers),
            cut_rows(intrinsics, numbers),
            caption=caption,
            text=read_embedding(facts),
        )

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Refuse: members besides the video, its caption and its JSON are not read.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"field {name}: got tars of videos, which have none, expected videos or a recording"
            f" (key {key}). Fix: encode without fields="
        )

    def _read(self, clip: TarClip, start: int, size: int) -> bytes:
        filesystem, path = self._tars[clip.tar]
        with named(clip.tar):
            return fetch(filesystem, path, start, start + size, POLICY) if size else b""


def expand(path: str) -> list[str]:
    """Return the tars that `source=` stands for.

    Raises:
        DataError: a command instead of a file, none at all, or compressed ones.
    """
    import braceexpand

    try:
        is_range = "{" in path and not Path(path).exists()
        urls = list(braceexpand.braceexpand(path)) if is_range else [path]
    except ValueError as error:
        raise DataError(
            f"source: got braces that do not close ({error}), expected {{a..b}}"
        ) from None
    if any(url.strip().startswith("pipe:") for url in urls):
        raise DataError(
            "source: got pipe:, which would run a command, expected files or URLs. Fix: give the"
            " URL itself"
        )
    if len(urls) == 1 and Path(path).is_dir():
        urls = [str(file) for file in visible(Path(path), "*.tar")]
    wrong = [url for url in urls if not bare(url).endswith(".tar")]
    if wrong or not urls:
        raise DataError(
            f"source: got {bare(wrong[0]) if wrong else path}, expected names that end in .tar: a"
            " clip is read from the middle of its tar, which a compressed one does not allow. Fix:"
            " decompress"
        )
    return urls


def bare(url: str) -> str:
    """Return the part of a URL that may be shown: no protocol, login or signature."""
    protocol, separator, rest = url.rpartition("://")
    if not separator:
        return os.path.abspath(url).lstrip("/")
    host, slash, path = rest.partition("/")
    path = path.partition("?")[0] if protocol.endswith(("http", "https")) else path
    return host.rpartition("@")[2] + slash + path


def tar_names(urls: Sequence[str]) -> list[str]:
    """Return what each tar is called: its path below the folder that holds all, without suffix."""
    paths = [bare(url) for url in urls]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.relpath(path, base).removesuffix(".tar") for path in paths]
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise DataError(f"source: got {twice[0]}.tar twice, expected each tar once")
    return names


def open_store(url: str, name: str) -> tuple[Any, str]:
    """Return (filesystem, path in it) of a tar."""
    try:
        return connect(url, POLICY)
    except DataError as error:  # whose message holds the URL, perhaps with a login
        raise DataError(
            f"source: got a URL of {url.partition('://')[0]!r}, expected a store that fsspec opens"
            f" ({type(error.__cause__).__name__}; {name}.tar)"
        ) from None


@contextmanager
def named(tar: str) -> Iterator[None]:
    """Turn what a store raises into a DataError with the tar's name; its own words may hold a
    signed URL."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"tar: cannot read {tar}.tar ({type(error).__name__}), expected each tar of the range."
            " Fix: give a range that is there; see access rights and the network"
        ) from None


def tar_facts(name: str, filesystem: Any, path: str) -> Mapping[str, Any]:
    """Return what the file system states about a tar."""
    with named(name):
        must_be_file(filesystem, path)
        return dict(with_retries(lambda: filesystem.info(path), POLICY))


def told_by(name: str, facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a tar from one of the same name: size, time, the store's own hash."""
    told = ("size", "mtime", "ETag", "LastModified", "generation", "md5Hash")
    return name, *(str(facts.get(key)) for key in told)


def open_webdataset(place: Place) -> WebDatasetSource:
    return WebDatasetSource(expand(place.path), place.reading)
