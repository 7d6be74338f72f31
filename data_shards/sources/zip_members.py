"""Read the members of a zip of latents or captions: names, JSON facts, and headers of arrays."""

from __future__ import annotations

import math
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.schema import MAX_MEMBER_BYTES, DataError, shown
from data_shards.sources.clips import safe_key
from data_shards.storage.files import check_regular, error_text, parse_json
from data_shards.storage.npz import read_header

FPS = 16.0  # of the published clips; a clip's JSON may say otherwise
MAX_JSON_BYTES = 2**20
RATES = (0.1, 1000.0)  # frames per second
LATENT_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Facts:
    """Store what a clip's JSON says. width, height: of the video the intrinsics refer to; 0 where
    they are not given."""

    fps: float
    episode: str
    prompt: str | None
    width: float
    height: float


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        check_regular(path.stat().st_mode)
        return zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises a dozen kinds for wrong bytes
        raise DataError(
            f"zip: cannot open {path} ({error_text(error)}), expected a zip. Fix: copy it again"
        ) from error


def members(archive: zipfile.ZipFile, suffix: str, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return name without suffix -> entry, of the regular files of one kind."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.is_dir() or not info.filename.endswith(suffix):
            continue
        name = info.filename.removesuffix(suffix)
        safe_key(name)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(
                f"zip member: got {info.filename!r}, a link, expected a file ({path}). Fix: make"
                " the zip again"
            )
        if name in found:
            raise DataError(
                f"zip member: got {info.filename!r} twice, expected unique names ({path}). Fix:"
                " make the zip again"
            )
        found[name] = info
    return found


def latent_shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[int, ...]:
    """Return [C, T, h, w] of a clip's `z`, read from its header alone.

    The shape must fit the size of the member.

    Raises:
        DataError: no array `z` of numbers, or a header that does not fit.
    """
    try:
        with archive.open(info) as outer, zipfile.ZipFile(outer) as npz:  # type: ignore[arg-type]
            inner = npz.getinfo("z.npy")
            with npz.open(inner) as file:
                shape, _, dtype, header = read_header(file)
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for wrong bytes
        raise DataError(
            f"latents: cannot read {info.filename!r} in {path} ({error_text(error)}), expected an"
            " npz with `z`. Fix: copy it again"
        ) from error
    size = math.prod(shape) * dtype.itemsize
    if dtype.name not in LATENT_DTYPES or len(shape) != 4 or 0 in shape:
        raise DataError(
            f"latents: got z {dtype} {shape}, expected [C, T, h, w] of {' or '.join(LATENT_DTYPES)}"
            f" ({info.filename} in {path})"
        )
    if inner.file_size != header + size or size > MAX_MEMBER_BYTES:
        raise DataError(
            f"latents: got z {dtype} {shape}, which is {size} bytes, in a member of"
            f" {inner.file_size} ({info.filename} in {path}). Fix: copy it again; at most"
            f" {MAX_MEMBER_BYTES} bytes"
        )
    return shape


def read_facts(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, with_camera: bool
) -> Facts:
    """Return the facts in a clip's JSON, whose size of the video is needed where it has a
    camera."""
    where = f"{info.filename!r} in {path.name}"
    if info.file_size > MAX_JSON_BYTES:
        raise DataError(
            f"zip member: got {info.file_size} bytes, expected at most {MAX_JSON_BYTES} ({where})"
        )
    try:
        data = archive.read(info)
    except Exception as error:  # zipfile and zlib raise a dozen kinds for wrong bytes
        raise DataError(
            f"zip: cannot read {where} ({error_text(error)}), expected a JSON object. Fix: copy it"
            " again"
        ) from error
    found = parse_json(data, "zip", where)
    prompt, episode = found.get("prompt"), found.get("episode", path.stem)
    sides = [found.get(name, 0) for name in ("width", "height")] if with_camera else [0, 0]
    rules = (
        ("prompt", prompt, prompt is None or isinstance(prompt, str), "a text"),
        ("episode", episode, type(episode) in (str, int), "a name"),
        ("fps", found.get("fps", FPS), is_between(found.get("fps", FPS), *RATES), "0.1 to 1000"),
        *(
            (name, side, not with_camera or is_between(side, 1, 2**16), "what intrinsics refer to")
            for name, side in zip(("width", "height"), sides, strict=True)
        ),
    )
    for name, value, right, rule in rules:
        if not right:
            raise DataError(f"zip: got {name} = {shown(value)}, expected {rule} ({where})")
    return Facts(float(found.get("fps", FPS)), str(episode), prompt, *map(float, sides))


def is_between(value: Any, low: float, high: float) -> bool:
    """Return True for a number from low to high."""
    return type(value) in (int, float) and low <= value <= high
