"""Read a folder of video files as a source of clips, with poses, intrinsics and controls.

These are in a file beside `name.mp4`, `name.npz` or `name.json` (same keys; npz without pickles):

    c2w or w2c   [F, 4, 4] or [F, 3, 4], OpenCV axes (+x right, +y down, +z forward), in metres
                 (or units of `metres_per_unit`)
    intrinsics   [4] or [F, 4] fx, fy, cx, cy in pixels, or a 3x3 matrix [3, 3] or [F, 3, 3]
    controls     [F, A] per raw frame, with `control_names` [A] and optionally `control_sums` [A]
                 (true: amounts that add up over frames)
    caption      text that describes the scene; or it is the content of `name.txt`
    text         [L, E] ready-made embeddings of it, with text_mask [L] (1 at real tokens), for
                 `encode text=ready`
    episode      name of the source video: clips of one episode go to the same side of the
                 validation split (default: the clip's own name)

Instead of c2w and intrinsics there may be a COLMAP text model in the folder `name.colmap`
(cameras.txt, images.txt; images sorted by name are the frames); instead of controls,
`name.events.npz` with the columns of `data_shards.controls.Events`. Either every clip has poses or
none has; the same for controls. Frames after the last multiple of 8 plus 1 are left out, with a
note. Hidden files are left out too, and two videos of one name (a.mp4, a.mkv) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import CONTROL_NAMES, Events
from data_shards.schema import DataError, check_key
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents
from data_shards.sources.digests import FileDigests, is_hidden, list_files
from data_shards.sources.video_file import (
    LENGTHS,
    SUFFIXES,
    check_packets,
    probe,
    read_frames,
    whole_groups,
)
from data_shards.storage.files import read_json

PARAMETERS = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
}  # COLMAP camera model -> where fx, fy, cx, cy are

BESIDE = (".npz", ".json", ".txt", ".colmap")  # what lies beside videos

Camera = tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None]


def square_poses(poses: NDArray[np.float64], inverted: bool, where: str) -> NDArray[np.float64]:
    """Convert [F,3,4] or [F,4,4], c2w or (inverted) w2c -> c2w [F,4,4], checked to be rigid."""
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)):
        raise DataError(
            f"poses: got shape {poses.shape}, expected [F, 3, 4] or [F, 4, 4] ({where})"
        )
    full = np.tile(np.eye(4), (len(poses), 1, 1))
    full[:, : poses.shape[1]] = poses
    rotation = full[:, :3, :3]
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max()
    if not error < 1e-3 or np.linalg.det(rotation).min() < 0:
        raise DataError(
            f"poses: got rotations off by {error:.3g} or mirrored, expected rigid OpenCV poses"
            f" ({where}). Fix: see its axes and scale"
        )
    return np.asarray(np.linalg.inv(full) if inverted else full, np.float64)


def square_intrinsics(values: NDArray[np.float64], frames: int, where: str) -> NDArray[np.float64]:
    """Convert [4], [F,4], [3,3] or [F,3,3] -> [F,4]."""
    if values.shape in ((3, 3), (frames, 3, 3)):
        values = np.stack(
            [values[..., 0, 0], values[..., 1, 1], values[..., 0, 2], values[..., 1, 2]], axis=-1
        )
    if values.shape not in ((4,), (frames, 4)) or not (values[..., :2] > 0).all():
        raise DataError(
            f"intrinsics: got shape {values.shape}, expected [4] or [{frames}, 4] with fx, fy > 0"
            f" ({where})"
        )
    return np.broadcast_to(values, (frames, 4)).copy()


def read_colmap(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read (c2w [F,4,4], intrinsics [F,4]) of a COLMAP text model, images sorted by name.

    Raises:
        DataError: missing files, a camera model with distortion, or lines that COLMAP does not
        write.
    """
    try:
        cameras = {}
        for line in (folder / "cameras.txt").read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                number, model, _, _, *parameters = line.split()
                if model not in PARAMETERS:
                    raise DataError(
                        f"colmap: got camera model {model}, expected one of {sorted(PARAMETERS)}"
                        f" ({folder}). Fix: undistort first"
                    )
                cameras[number] = [float(parameters[i]) for i in PARAMETERS[model]]
        lines = [
            line
            for line in (folder / "images.txt").read_text().splitlines()
            if not line.startswith("#")
        ]
        # every second line lists points
        images = [lines[i].split(maxsplit=9) for i in range(0, len(lines), 2) if lines[i].strip()]
        images.sort(key=lambda image: image[9])
        w2c = np.tile(np.eye(4), (len(images), 1, 1))
        for i, image in enumerate(images):
            w, x, y, z = (float(value) for value in image[1:5])
            w2c[i, :3, :3] = np.array(
                [
                    [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                    [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                    [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
                ]
            )
            w2c[i, :3, 3] = [float(value) for value in image[5:8]]
        intrinsics = np.array([cameras[image[8]] for image in images])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"colmap: cannot read the text model in {folder} ({type(error).__name__}: {error}),"
            " expected COLMAP's files"
        ) from error
    return square_poses(w2c, inverted=True, where=str(folder)), intrinsics


def read_sidecar(video: Path) -> dict[str, Any]:
    """Read name.npz or name.json, with arrays as numpy arrays; {} if there is neither."""
    npz, text = video.with_suffix(".npz"), video.with_suffix(".json")
    if npz.exists() and text.exists():
        raise DataError(
            f"sidecar: got {npz.name} and {text.name}, expected one of them. Fix: merge them"
        )
    if npz.exists():
        try:
            with np.load(npz, allow_pickle=False) as content:
                return {name: content[name] for name in content.files}
        except (OSError, ValueError) as error:
            raise DataError(
                f"sidecar: cannot read {npz} ({error}), expected an npz of numbers without pickles"
            ) from error
    return read_json(text, "sidecar") if text.exists() else {}


def list_videos(folder: Path) -> tuple[dict[str, Path], dict[str, str], int]:
    """Return key -> video of the files in a folder, file name -> what is wrong with it, and how
    many videos are left out as hidden (`._clip.mp4`, as desktops write them)."""
    found: dict[str, Path] = {}
    problems: dict[str, str] = {}
    hidden = 0
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES:
            continue
        if is_hidden(file.name):
            hidden += 1
            continue
        try:
            key = check_key(file.stem)
        except DataError as error:
            problems[file.name] = str(error)
            continue
        other = found.setdefault(key, file)
        if other != file:
            problems[file.name] = (
                f"clip key: got {other.name} and {file.name}, which are both the clip {key!r},"
                " expected one video of a name. Fix: rename one of them, and what lies beside it"
            )
    return found, problems, hidden


class VideosSource:
    """Read clips from a folder of video files."""

    libraries = ("av",)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: StoredLatents | None = None
        self._digests = FileDigests()
        self._files, problems, hidden = list_videos(folder)
        self.problems: Mapping[str, str] = problems
        clips, rates, trimmed = [], set(), 0
        names: set[tuple[str, ...]] = set()
        sums: tuple[bool, ...] = ()
        scales = set()
        for key, file in self._files.items():
            try:
                frames, height, width, rate = probe(str(file), file.name)
                sidecar = read_sidecar(file)
                episode = check_key(str(sidecar.get("episode", key)))
            except DataError as error:
                problems[file.name] = str(error)
                continue
            kept = whole_groups(frames)
            trimmed += frames - kept
            rates.add(rate)
            clips.append(SourceClip(key, episode, kept, height, width))
            scales.add(float(sidecar.get("metres_per_unit", 1.0)))
            found = (
                CONTROL_NAMES
                if file.with_suffix(".events.npz").exists()
                else tuple(str(n) for n in sidecar.get("control_names", ()))
            )
            names.add(found)
            sums = tuple(bool(x) for x in sidecar.get("control_sums", [False] * len(found)))
        for what, values in (
            ("frame rates", rates),
            ("control names", names),
            ("metres_per_unit", scales),
        ):
            if len(values) > 1:
                different = (
                    f"videos: got different {what} {sorted(values)[:3]} in {folder}, expected one."
                    " Fix: encode them separately"
                )
                raise DataError("\n".join([*problems.values(), different]))
        self.clips, self.control_sums = tuple(clips), sums
        self.fps, self.control_names = (
            (float(next(iter(rates))), next(iter(names))) if clips else (0.0, ())
        )
        self.metres_per_unit = next(iter(scales), 1.0)
        notes = {
            f"{trimmed} frames at the ends of clips are left out: {LENGTHS}": trimmed,
            f"{hidden} hidden videos are left out (names that begin with a dot)": hidden,
        }
        if alone := [path.name for path in self._without_video()]:
            shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            notes[f"{len(alone)} files are left out that belong to no video: {shown}"] = len(alone)
        self.notes: tuple[str, ...] = tuple(note for note, count in notes.items() if count)
        self.description = f"videos, {len(clips)} files"

    def load(self, clip: SourceClip) -> ClipContent:
        file = self._files[clip.key]
        return replace(self._beside(clip), video=read_frames(str(file), clip, file.name))

    def check(self, clip: SourceClip) -> ClipContent:
        """Return what lies beside the video; the file must hold all packets of the clip."""
        file = self._files[clip.key]
        check_packets(str(file), clip.frames, file.name)
        return self._beside(clip)

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the digest of the video and of everything beside it that has the clip's name."""
        file = self._files[clip.key]
        beside = [file, *self._sidecars.get(file.stem, ())]
        files = [inner for path in beside for inner in list_files(path)]
        return {path.relative_to(self.folder).as_posix(): self._digests.of(path) for path in files}

    @cached_property
    def _sidecars(self) -> dict[str, list[Path]]:
        """Return stem -> what lies beside the video of that stem: a key holds no dot, so a name is
        its stem up to the first."""
        videos, found = set(self._files.values()), dict[str, list[Path]]()
        for path in sorted(self.folder.iterdir()):
            if path not in videos and not is_hidden(path.name):
                found.setdefault(path.name.partition(".")[0], []).append(path)
        return found

    def _without_video(self) -> list[Path]:
        """Return what looks as if it lay beside a video, but has the name of none."""
        stems = {file.stem for file in self._files.values()} | {
            name.partition(".")[0] for name in self.problems
        }
        others = [
            path for stem, paths in self._sidecars.items() for path in paths if stem not in stems
        ]
        return [path for path in others if path.suffix in BESIDE]

    def _beside(self, clip: SourceClip) -> ClipContent:
        """Return all of a clip but its pixels."""
        file, frames = self._files[clip.key], clip.frames
        sidecar, where = read_sidecar(file), file.name
        colmap = file.with_suffix(".colmap")
        camera = read_colmap(colmap) if colmap.is_dir() else read_camera(sidecar, where)
        c2w, intrinsics = cut_camera(camera, frames, self.metres_per_unit, where)
        controls = np.array(sidecar["controls"], np.float32) if "controls" in sidecar else None
        if controls is not None and len(controls) < frames:
            raise DataError(
                f"sidecar: got controls for {len(controls)} frames, expected at least {frames}"
                f" ({where})"
            )
        if controls is not None and controls.shape[1:] != (len(self.control_names),):
            raise DataError(
                f"sidecar: got controls {controls.shape}, expected [F, {len(self.control_names)}]"
                f" as control_names ({where})"
            )
        return ClipContent(
            None,
            c2w,
            intrinsics,
            None if controls is None else controls[:frames],
            read_events(file.with_suffix(".events.npz")),
            caption=read_caption(file.with_suffix(".txt"), sidecar),
            text=read_text(sidecar, where),
        )

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return an array of the clip's sidecar.

        Raises:
            DataError: a sidecar without it.
        """
        sidecar = read_sidecar(self._files[key])
        if name not in sidecar:
            raise DataError(
                f"sidecar: got no {name}, expected it for every clip (key {key}). Fix: add it, or"
                " encode without fields="
            )
        return np.array(sidecar[name])


def read_caption(path: Path, sidecar: Mapping[str, Any]) -> str | None:
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    return str(sidecar["caption"]) if "caption" in sidecar else None


def read_text(
    sidecar: Mapping[str, Any], where: str
) -> tuple[NDArray[np.float32], NDArray[np.uint8]] | None:
    if "text" not in sidecar:
        return None
    if "text_mask" not in sidecar:
        raise DataError(f"sidecar: got text without text_mask, expected both ({where})")
    return np.array(sidecar["text"], np.float32), np.array(sidecar["text_mask"]).astype(np.uint8)


def read_events(path: Path) -> Events | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            return Events(*(content[name] for name in ("time_ns", "kind", "code", "dx", "dy")))
    except (OSError, KeyError) as error:
        raise DataError(
            f"control events: cannot read {path.name} ({error}), expected time_ns, kind, code,"
            " dx, dy"
        ) from error


def read_camera(sidecar: Mapping[str, Any], where: str) -> Camera:
    """Return (c2w [F,4,4] in the sidecar's units, intrinsics [F,4]) of a sidecar, or two None."""
    if "c2w" in sidecar and "w2c" in sidecar:
        raise DataError(f"sidecar: got c2w and w2c, expected one of them ({where})")
    if "c2w" not in sidecar and "w2c" not in sidecar:
        return None, None
    if "intrinsics" not in sidecar:
        raise DataError(f"sidecar: got poses without intrinsics, expected both ({where})")
    poses = np.array(sidecar["c2w" if "c2w" in sidecar else "w2c"], np.float64)
    c2w = square_poses(poses, "c2w" not in sidecar, where)
    return c2w, square_intrinsics(np.array(sidecar["intrinsics"], np.float64), len(c2w), where)


def cut_camera(camera: Camera, frames: int, metres_per_unit: float, where: str) -> Camera:
    """Return the camera of the first frames, in metres."""
    c2w, intrinsics = camera
    if c2w is None or intrinsics is None:
        return None, None
    if len(c2w) < frames:
        raise DataError(
            f"sidecar: got poses for {len(c2w)} frames, expected at least {frames} ({where})"
        )
    c2w = c2w[:frames].copy()
    c2w[:, :3, 3] *= metres_per_unit
    return c2w, intrinsics[:frames]


def open_videos(place: Place) -> VideosSource:
    return VideosSource(Path(place.path))
