"""Read the public SANA-WM training layout: zips of LTX-2 latents, with captions and cameras.

The layout (NVlabs/Sana, diffusion/data/datasets/video/sana_wm_zip_latent_data.py), in which the
training set is published:

    <source>/<name>.zip
        per clip `<key>.json`: prompt, height, width (of the video the intrinsics refer to)
    <latents>/<name>.zip
        per clip `<key>.npz` with `z` [C, T, h, w], normalised by the autoencoder's own statistics
    <source>/<name>_camera.npz
        ids [N], ranges [N, 2] (start, count), pose [sum, 4, 4] c2w, intrinsics [sum, 4]
    <source>/<name>_metric_scale_stats.json
        {key: number, or object with `median`}: the factor for a pose's translation

A clip without latents, or, in a zip with cameras, without camera or scale, is left out and counted
in a note: an invented pose would be wrong. All clips of a zip are one episode, unless their JSON
names an `episode`, because the published clips overlap in time. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import MAX_MEMBER_BYTES, DataError
from data_shards.sources import Place
from data_shards.sources.beside_video import square_intrinsics, square_poses
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents, safe_key
from data_shards.sources.digests import digest_arrays, visible
from data_shards.storage.files import read_json

TEMPORAL_STRIDE, SPATIAL_STRIDE = 8, 32  # of the LTX-2 autoencoder
FPS = 16.0  # of the published clips; a clip's JSON may say otherwise
MAX_JSON_BYTES = 2**20
LATENT_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Entry:
    """Locate a clip. camera: rows (start, count) of the zip's camera file."""

    stem: str
    name: str  # of the members, without suffix
    facts: Mapping[str, Any]
    camera: tuple[int, int] | None
    metres: float
    checksums: tuple[int, int]  # CRC-32 of its JSON and its npz, as the zips state them


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"zip: cannot open {path} ({error}), expected a zip. Fix: copy it again"
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
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(file)
                header = file.tell()
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,  # zipfile's word for a compression or flag that it cannot read
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"latents: cannot read {info.filename} in {path} ({error}), expected an npz with `z`."
            " Fix: copy it again"
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
    return tuple(int(n) for n in shape)


class LatentZipsSource:
    """Read clips from zips of latents and the files beside them."""

    libraries: tuple[str, ...] = ()

    def __init__(self, folder: Path, latents: Path) -> None:
        self.folder, self.latents = folder, latents
        self.metres_per_unit = 1.0
        self.control_names: tuple[str, ...] = ()
        self.control_sums: tuple[bool, ...] = ()
        self.problems: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        # clips come zip by zip
        self._track = lru_cache(maxsize=1)(partial(self._camera, names=("pose", "intrinsics")))
        clips, content = [], hashlib.sha256()
        self._without_latents = self._without_camera = 0
        shapes: set[tuple[int, int, int]] = set()
        rates = set()
        wrong: list[str] = []
        for file in visible(folder, "*.zip"):
            try:
                listed = self._list(file, latents / file.name, content)
            except DataError as error:
                wrong.append(str(error))
                continue
            for key, entry, (channels, count, height, width) in listed:
                if key in self._entries:
                    wrong.append(
                        f"clip key: got {key!r} in {self._entries[key].stem}.zip and {file.name},"
                        " expected unique keys"
                    )
                self._entries[key] = entry
                shapes.add((channels, height, width))
                rates.add(float(entry.facts.get("fps", FPS)))
                frames = (count - 1) * TEMPORAL_STRIDE + 1
                episode = safe_key(str(entry.facts.get("episode", entry.stem)))
                clips.append(
                    SourceClip(
                        key, episode, frames, height * SPATIAL_STRIDE, width * SPATIAL_STRIDE
                    )
                )
        for what, values in (("latent shapes", shapes), ("frame rates", rates)):
            if len(values) > 1:
                wrong.append(
                    f"zips: got different {what} {sorted(values)[:3]} in {folder}, expected one."
                    " Fix: encode them separately"
                )
        if wrong:
            raise DataError("\n".join([*wrong, *self.problems.values()]))
        self.clips, self.fps = tuple(clips), next(iter(rates), FPS)
        channels = next(iter(shapes))[0] if shapes else 0
        self.stored: StoredLatents | None = StoredLatents(
            "ltx2", channels, TEMPORAL_STRIDE, SPATIAL_STRIDE, {"normalised": True}
        )
        left_out = (
            (self._without_latents, "no latents"),
            (self._without_camera, "no camera or scale, as others of their zip have"),
        )
        self.notes: tuple[str, ...] = tuple(
            f"{count} clips are left out: {why}" for count, why in left_out if count
        )
        self.description = f"latent zips, {len(clips)} clips, content {content.hexdigest()[:16]}"

    def _list(
        self, file: Path, cache: Path, content: Any
    ) -> list[tuple[str, Entry, tuple[int, ...]]]:
        """Return the usable clips of a zip.

        content: updated with what identifies their content, the zips' own checksums.
        """
        if not cache.exists():
            raise DataError(
                f"latents: got no {file.name} in {cache.parent}, expected one beside each zip of"
                f" {file.parent}. Fix: copy it there"
            )
        camera, scales, found = (
            self._camera(file.stem, ("ids", "ranges")),
            self._scales(file.stem),
            [],
        )
        ranges = (
            {}
            if camera is None
            else {
                str(key): (int(a), int(b)) for key, (a, b) in zip(camera["ids"], camera["ranges"])
            }
        )
        with open_zip(file) as raw, open_zip(cache) as latents:
            stored = members(latents, ".npz", cache)
            for name, info in sorted(members(raw, ".json", file).items()):
                if name not in stored:
                    self._without_latents += 1
                    continue
                if (camera is not None and name not in ranges) or (
                    scales is not None and name not in scales
                ):
                    self._without_camera += 1
                    continue
                scale = 1.0 if scales is None else scales[name]
                checksums = info.CRC, stored[name].CRC
                content.update(
                    repr((file.name, name, *checksums, ranges.get(name), scale)).encode()
                )
                try:
                    facts = read_facts(raw, info, file)
                    shape = latent_shape(latents, stored[name], cache)
                except DataError as error:
                    self.problems[f"{file.name}/{name}"] = str(error)
                    continue
                entry = Entry(file.stem, name, facts, ranges.get(name), scale, checksums)
                found.append((safe_key(name), entry, shape))
        return found

    def _camera(self, stem: str, names: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
        """Return these arrays of a zip's cameras; None if it has none."""
        path = self.folder / f"{stem}_camera.npz"
        if not path.exists():
            return None
        try:
            with np.load(
                path, allow_pickle=False
            ) as file:  # which reads an array anew each time it is asked for
                camera = {name: file[name] for name in names}
                absent = {"ids", "ranges", "pose", "intrinsics"} - set(file.files)
            if absent or len({len(array) for array in camera.values()}) > 1:
                raise ValueError("arrays are missing or of different lengths")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"camera: cannot read {path} ({error}), expected ids, ranges, pose, intrinsics"
                " without pickles"
            ) from error
        return camera

    def _scales(self, stem: str) -> dict[str, float] | None:
        path = self.folder / f"{stem}_metric_scale_stats.json"
        if not path.exists():
            return None
        scales = {}
        for key, value in read_json(path, "metric scale").items():
            number = value.get("median") if isinstance(value, dict) else value
            if not isinstance(number, (int, float)) or not math.isfinite(number) or number <= 0:
                raise DataError(
                    f"metric scale: got {value!r}, expected a positive number or one under `median`"
                    f" ({path}, key {key})"
                )
            scales[key] = float(number)
        return scales

    def load(self, clip: SourceClip) -> ClipContent:
        entry = self._entries[clip.key]
        path = self.latents / f"{entry.stem}.zip"
        with open_zip(path) as archive:
            info = archive.getinfo(f"{entry.name}.npz")
            latent_shape(archive, info, path)
            try:
                with (
                    archive.open(info) as file,
                    np.load(io.BytesIO(file.read()), allow_pickle=False) as npz,
                ):
                    # [C, T, h, w] -> [T, C, h, w]
                    latents = npz["z"].astype(np.float32).transpose(1, 0, 2, 3)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"latents: cannot read {info.filename} in {path} ({error}). Fix: copy it again"
                ) from error
        return replace(self.check(clip), latents=latents)

    def check(self, clip: SourceClip) -> ClipContent:
        """Return the content without its latents, whose header was read with the list of clips."""
        entry = self._entries[clip.key]
        c2w = intrinsics = None
        if entry.camera is not None:
            c2w, intrinsics = self._poses(entry, clip)
        caption = entry.facts.get("prompt")
        return ClipContent(None, c2w, intrinsics, caption=None if caption is None else str(caption))

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the checksums that the zips state, and a digest of the clip's own cameras."""
        entry = self._entries[clip.key]
        name = f"{entry.stem}.zip/{entry.name}"
        found = {
            f"{name}{suffix}": f"crc32 {crc:08x}"
            for suffix, crc in zip((".json", ".npz"), entry.checksums, strict=True)
        }
        if entry.camera is not None:
            camera, (start, count) = self._track(entry.stem), entry.camera
            assert camera is not None, "it was there when the clips were listed"
            rows = [camera[array][start : start + count] for array in ("pose", "intrinsics")]
            found[f"{entry.stem}_camera.npz"] = digest_arrays(rows)
        found[f"{entry.stem}_metric_scale_stats.json"] = repr(entry.metres)
        return found

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Refuse: this layout has no further arrays.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"field {name}: got zips of latents, which hold none, expected videos or a recording"
            f" (key {key}). Fix: encode without fields="
        )

    def _poses(
        self, entry: Entry, clip: SourceClip
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return c2w [F,4,4] in metres, and intrinsics [F,4] in pixels of the decoded frames."""
        where, camera = f"{entry.stem}_camera.npz, key {entry.name}", self._track(entry.stem)
        assert entry.camera is not None, "callers look"
        assert camera is not None, "it was there when the clips were listed"
        start, count = entry.camera
        if count < clip.frames or start < 0 or start + count > len(camera["pose"]):
            raise DataError(
                f"camera: got {count} poses from {start}, expected at least {clip.frames} inside"
                f" the file ({where})"
            )
        rows = slice(start, start + clip.frames)
        c2w = square_poses(np.asarray(camera["pose"][rows], np.float64), False, where)
        c2w[:, :3, 3] *= entry.metres
        intrinsics = square_intrinsics(
            np.asarray(camera["intrinsics"][rows], np.float64), clip.frames, where
        )
        width, height = (entry.facts.get(name) for name in ("width", "height"))
        if not all(isinstance(side, (int, float)) and side > 0 for side in (width, height)):
            raise DataError(
                f"zip: got width {width} and height {height}, expected what the intrinsics refer to"
                f" ({entry.stem}.zip, {entry.name}.json)"
            )
        # the videos were resized, not cropped, before encoding
        scale = np.array([clip.width, clip.height]) / np.array([width, height], np.float64)
        return c2w, intrinsics * np.tile(scale, 2)


def read_facts(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> dict[str, Any]:
    if info.file_size > MAX_JSON_BYTES:
        raise DataError(
            f"zip member: got {info.file_size} bytes, expected at most {MAX_JSON_BYTES}"
            f" ({info.filename} in {path})"
        )
    try:
        facts = json.loads(archive.read(info))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"zip: cannot read {info.filename} in {path} ({error}), expected a JSON object. Fix:"
            " copy it again"
        ) from error
    if not isinstance(facts, dict):
        raise DataError(
            f"zip: got {type(facts).__name__} in {info.filename} of {path}, expected a JSON object"
        )
    return facts


def open_latent_zips(place: Place) -> LatentZipsSource:
    if not place.latents:
        raise DataError(
            f"latents: got none for the zips in {place.path}, expected the folder with their"
            " latents. Fix: latents=<folder>"
        )
    return LatentZipsSource(Path(place.path), Path(place.latents))
