"""List the clips in one tar of videos by reading its headers and the heads of its videos.

See data_shards/sources/webdataset.py.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_shards.beside.sidecar import Sidecar, check_names, of_json
from data_shards.schema import KEY_PATTERN, DataError
from data_shards.sources.clips import SourceClip, safe_key
from data_shards.sources.reading import Reading
from data_shards.sources.video_file import SUFFIXES, VideoFacts, probe
from data_shards.storage.files import parse_json

MAX_TEXT_BYTES = 2**24  # of a caption or JSON
PADDING = 2**20  # no writer pads a tar's end with more
NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<suffix>[^/]+)")  # WebDataset's rule
CONTROLS = ("controls", "control_names")


@dataclass(frozen=True)
class TarClip(SourceClip):
    """Locate a clip in a tar, so that a worker reads it without a listing.

    members: (suffix, first byte, size) in the tar.
    """

    tar: str
    facts: VideoFacts
    trimmed: int  # frames past the last that is kept
    members: tuple[tuple[str, int, int], ...]
    name: str


@dataclass(frozen=True)
class TarList:
    """Hold the clips of a tar, in its order, the names of what is left out, and clip -> what is
    wrong with it."""

    clips: list[TarClip]
    left_out: list[str]
    problems: dict[str, str]


def list_tar(file: BinaryIO, tar: str, reading: Reading) -> TarList:
    """List the clips of an open tar.

    Raises:
        DataError: a cut or damaged tar, or a name that comes twice.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    left_out = []
    if not isinstance(getattr(file, "size", 0), int):  # a stream of fsspec's, without its length
        raise DataError(
            f"tar: cannot read parts of {tar}.tar, expected a server that gives byte ranges. Fix:"
            " download it"
        )
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for name, info in plain_members(archive, tar):
                split = NAME.fullmatch(name)
                suffix = split["suffix"].lower() if split else ""
                if split is None or f".{suffix}" not in (*SUFFIXES, ".txt", ".json"):
                    left_out.append(f"{tar}/{name}")
                    continue
                members = samples.setdefault(split["key"], {})
                if suffix in members:
                    raise DataError(
                        f"tar member: got {name!r} twice, expected unique names ({tar}.tar). Fix:"
                        " make the tar again"
                    )
                members[suffix] = info
            check_end(file, archive.offset, tar)
            clips: list[TarClip] = []
            problems: dict[str, str] = {}
            for key, members in samples.items():
                videos = [suffix for suffix in members if f".{suffix}" in SUFFIXES]
                if len(videos) > 1:
                    problems[f"{tar}/{key}"] = (
                        f"tar: got {' and '.join(videos)} of the clip {tar}/{key}, expected one"
                    )
                elif videos:
                    try:
                        clips.append(describe(archive, tar, key, videos[0], members, reading))
                    except DataError as error:
                        problems[f"{tar}/{key}"] = str(error)
                else:
                    left_out.append(f"{tar}/{key} (no video)")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"tar: cannot read {tar}.tar ({error}), expected a whole tar. Fix: copy it again"
        ) from error
    return TarList(clips, left_out, problems)


def plain_members(archive: tarfile.TarFile, tar: str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield (name, entry) of the files in a tar."""
    for info in archive:
        name = info.name.removeprefix("./")
        if info.isdir():
            continue
        safe_key(name, "tar member")
        if not info.isreg() or info.issparse():
            raise DataError(
                f"tar member: got {name!r}, a link or device, expected a file ({tar}.tar). Fix:"
                " make the tar again"
            )
        yield name, info


def check_end(file: BinaryIO, end: int, tar: str) -> None:
    """Raise DataError unless the members are followed by the zeros that end a tar: reading stops
    without an error at a damaged header and at the end of a file that was cut."""
    file.seek(end)
    tail = file.read(PADDING)
    if len(tail) < tarfile.BLOCKSIZE or any(tail):
        raise DataError(
            f"tar: got {tar}.tar, which goes on after byte {end} with"
            f" {'something that is no member' if any(tail) else 'nothing'}, expected the zeros that"
            " end a tar: it is cut or damaged. Fix: copy it again"
        )


def describe(
    archive: tarfile.TarFile,
    tar: str,
    key: str,
    video: str,
    members: dict[str, tarfile.TarInfo],
    reading: Reading,
) -> TarClip:
    """Return what is known of a clip from the head of its video and from its JSON."""
    name = f"{tar}/{key}"
    of_video = probe(archive.extractfile(members[video]), f"{name}.{video}")
    if reading.fps is None:
        of_video.times.require_even(f"{name}.{video}")
    facts = Sidecar(name)
    for suffix in members.keys() & {"txt", "json"}:
        if members[suffix].size > MAX_TEXT_BYTES:
            raise DataError(
                f"tar member: got {members[suffix].size} bytes, expected at most {MAX_TEXT_BYTES}"
                f" ({name}.{suffix})"
            )
    if "json" in members:
        file = archive.extractfile(members["json"])
        assert file is not None, "it is a file"
        facts = read_facts(file.read(), name)
    if any(control in facts.names for control in CONTROLS):
        raise DataError(
            f"tar: got controls in {name}.json, expected none: they are read beside videos in a"
            " folder only. Fix: unpack the tars"
        )
    parts = tuple((suffix, info.offset_data, info.size) for suffix, info in members.items())
    clip_key, episode = safe_key(name, "clip"), facts.episode
    episode = safe_key(name) if episode is None else episode
    if not KEY_PATTERN.fullmatch(
        episode
    ):  # say a URL: any name will do that is the same for its clips
        episode = hashlib.sha256(episode.encode()).hexdigest()[:32]
    frames = of_video.times.count(reading.fps)
    kept, size = reading.time.below(frames), (of_video.height, of_video.width)
    if kept > frames:
        raise DataError(
            f"tar: got {name} of {frames} frames, expected at least {kept}, those of one latent."
            " Fix: leave it out"
        )
    return TarClip(clip_key, episode, kept, *size, tar, of_video, frames - kept, parts, name)


def read_facts(data: bytes, name: str) -> Sidecar:
    """Return the facts in a clip's JSON, which may hold others of the program that wrote it."""
    found = parse_json(data, "tar member", f"{name}.json")
    check_names(found, f"{name}.json", foreign=True)
    return of_json(found, f"{name}.json")


def read_caption(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"tar member: got {name}.txt, which is no UTF-8 ({error})") from error
