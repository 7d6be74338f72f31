"""Read what lies beside a video: its sidecar, COLMAP model, caption and events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.controls import Events
from data_shards.schema import DataError
from data_shards.storage.files import read_json

PARAMETERS = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
}  # COLMAP camera model -> where fx, fy, cx, cy are

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


def cut_camera(
    camera: Camera, numbers: NDArray[np.int64], metres_per_unit: float, where: str
) -> Camera:
    """Return the camera of the frames of these numbers, in metres."""
    c2w, intrinsics = camera
    if c2w is None or intrinsics is None:
        return None, None
    if len(c2w) <= numbers[-1]:
        raise DataError(
            f"sidecar: got poses for {len(c2w)} frames, expected at least {numbers[-1] + 1}"
            f" ({where})"
        )
    c2w = c2w[numbers]
    c2w[:, :3, 3] *= metres_per_unit
    return c2w, intrinsics[numbers]
