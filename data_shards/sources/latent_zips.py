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
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.beside.sidecar import UNITS
from data_shards.cameras import camera_problem, square_intrinsics, square_poses
from data_shards.schema import MAX_MEMBER_BYTES, DataError, shown
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents, safe_key
from data_shards.sources.digests import digest_arrays, visible
from data_shards.sources.zip_members import (
    FPS,
    Facts,
    is_between,
    latent_shape,
    members,
    open_zip,
    read_facts,
)
from data_shards.storage.files import error_text, read_json
from data_shards.storage.npz import open_npz

TEMPORAL_STRIDE, SPATIAL_STRIDE = 8, 32  # of the LTX-2 autoencoder
CAMERA_ARRAYS = {"ids": ("U", 1), "ranges": ("iu", 2), "pose": ("f", 3), "intrinsics": ("f", 2)}


@dataclass(frozen=True)
class Entry:
    """Locate a clip. camera: rows (start, count) of the zip's camera file."""

    stem: str
    name: str  # of the members, without suffix
    facts: Facts
    camera: tuple[int, int] | None
    metres: float
    checksums: tuple[int, int]  # CRC-32 of its JSON and its npz, as the zips state them


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
                rates.add(entry.facts.fps)
                frames = (count - 1) * TEMPORAL_STRIDE + 1
                episode = safe_key(entry.facts.episode)
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
                str(key): (int(a), int(b))
                for key, (a, b) in zip(camera["ids"], camera["ranges"], strict=True)
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
                    facts = read_facts(raw, info, file, camera is not None)
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
        with open_npz(path, path.name, "camera") as file:
            if absent := {"ids", "ranges", "pose", "intrinsics"} - file.names:
                raise file.error(f"it has no {' and no '.join(sorted(absent))}")
            camera = {name: file.read(name, MAX_MEMBER_BYTES) for name in names}
        for name, array in camera.items():
            kinds, dims = CAMERA_ARRAYS[name]
            if array.dtype.kind not in kinds or array.ndim != dims:
                raise DataError(
                    f"camera: got {name} {array.dtype} {array.shape}, expected"
                    f" {'text' if 'U' in kinds else 'numbers'} of {dims} dimensions ({path.name})"
                )
        if len({len(array) for array in camera.values()}) > 1 or (
            "ranges" in camera and camera["ranges"].shape[1] != 2
        ):
            raise DataError(
                f"camera: got {', '.join(f'{n} {a.shape}' for n, a in camera.items())}, expected"
                f" as many rows in each, and ranges [N, 2] ({path.name})"
            )
        return camera

    def _scales(self, stem: str) -> dict[str, float] | None:
        path = self.folder / f"{stem}_metric_scale_stats.json"
        if not path.exists():
            return None
        scales = {}
        for key, value in read_json(path, "metric scale").items():
            number: Any = value.get("median") if isinstance(value, dict) else value
            if not is_between(number, *UNITS):
                raise DataError(
                    f"metric scale: got {shown(number)}, expected a number from {UNITS[0]:g} to"
                    f" {UNITS[1]:g}, or one under `median` ({path}, key {shown(key)})"
                )
            scales[key] = float(number)
        return scales

    def load(self, clip: SourceClip) -> ClipContent:
        entry = self._entries[clip.key]
        path = self.latents / f"{entry.stem}.zip"
        with open_zip(path) as archive:
            try:
                info = archive.getinfo(f"{entry.name}.npz")
            except KeyError:
                raise DataError(
                    f"latents: got no {entry.name!r}.npz in {path}, which had one when the clips"
                    " were listed. Fix: leave it alone while encoding"
                ) from None
            shape = latent_shape(archive, info, path)
            if (shape[1] - 1) * TEMPORAL_STRIDE + 1 != clip.frames:
                raise DataError(
                    f"latents: got z {shape}, expected the frames that were there when the clips"
                    f" were listed ({info.filename!r} in {path}). Fix: leave it alone while"
                    " encoding"
                )
            try:
                data = archive.read(info)
            except Exception as error:  # as above
                raise DataError(
                    f"latents: cannot read {info.filename!r} in {path} ({error_text(error)}). Fix:"
                    " copy it again"
                ) from error
        with open_npz(data, f"{entry.name}.npz in {path.name}", "latents") as npz:
            # [C, T, h, w] -> [T, C, h, w]
            latents = npz.read("z", MAX_MEMBER_BYTES).astype(np.float32).transpose(1, 0, 2, 3)
        return replace(self.check(clip), latents=latents)

    def check(self, clip: SourceClip) -> ClipContent:
        """Return the content without its latents, whose header was read with the list of clips."""
        entry = self._entries[clip.key]
        c2w = intrinsics = None
        if entry.camera is not None:
            c2w, intrinsics = self._poses(entry, clip)
        return ClipContent(None, c2w, intrinsics, caption=entry.facts.prompt)

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
        # latents hold whole groups of frames: the video may have had some more at its end
        if not clip.frames <= count < clip.frames + TEMPORAL_STRIDE:
            raise DataError(
                f"camera: got {count} poses, expected one for each of {clip.frames} to"
                f" {clip.frames + TEMPORAL_STRIDE - 1} frames ({where}). Fix: take those of this"
                " clip"
            )
        if start < 0 or start + count > len(camera["pose"]):
            raise DataError(
                f"camera: got {count} poses from row {start}, expected rows inside the"
                f" {len(camera['pose'])} of the file ({where})"
            )
        rows = slice(start, start + clip.frames)
        c2w = square_poses(np.asarray(camera["pose"][rows], np.float64), False, where)
        c2w[:, :3, 3] *= entry.metres
        intrinsics = square_intrinsics(
            np.asarray(camera["intrinsics"][rows], np.float64), clip.frames, where
        )
        width, height = entry.facts.width, entry.facts.height
        if problem := camera_problem(c2w, intrinsics, round(height), round(width)):
            raise DataError(f"camera: {problem} ({where}). Fix: see units and order")
        # the videos were resized, not cropped, before encoding
        scale = np.array([clip.width, clip.height]) / np.array([width, height], np.float64)
        return c2w, intrinsics * np.tile(scale, 2)


def open_latent_zips(place: Place) -> LatentZipsSource:
    if not place.latents:
        raise DataError(
            f"latents: got none for the zips in {place.path}, expected the folder with their"
            " latents. Fix: latents=<folder>"
        )
    return LatentZipsSource(Path(place.path), Path(place.latents))
