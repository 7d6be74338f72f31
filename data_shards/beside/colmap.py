"""Read a COLMAP text model as the camera of a video's frames.

cameras.txt:  CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS...
images.txt:   IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, each followed by a line of points
              (X Y POINT3D_ID)..., which may be empty or, from other programs, missing

A frame's number is the last number in its image's name. The images must be all frames of the video.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_shards.cameras import square_poses
from data_shards.schema import DataError, shown
from data_shards.storage.files import read_text

PARAMETERS = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
}  # COLMAP camera model -> where fx, fy, cx, cy are
NUMBER = re.compile(r"\d+(?=\D*$)")  # the last one of a name
HEADER = 10  # columns before and with an image's name
UNIT = 1e-3  # what rounding may add to a quaternion's length


def read_colmap(
    folder: Path, frames: int, size: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (c2w [F,4,4] in the model's units, intrinsics [F,4]) of a text model.

    frames, size: number and (height, width) of the video's frames.

    Raises:
        DataError: missing files, a camera model with distortion, lines that COLMAP does not write,
        images of another size, or frames that were not registered.
    """
    if not (folder / "images.txt").exists() and (folder / "images.bin").exists():
        raise DataError(
            f"colmap: got a binary model in {folder.name}, expected a text model. Fix: colmap"
            f" model_converter --output_type TXT --input_path {folder.name} --output_path"
            f" {folder.name}"
        )
    cameras = read_cameras(folder / "cameras.txt", size)
    poses, intrinsics, names = [], [], []
    for line, fields in image_lines(folder / "images.txt"):
        where = f"line {line} of {folder.name}/images.txt"
        values = numbers(fields[1:8], where)
        if abs(np.linalg.norm(values[:4]) - 1) > UNIT:
            raise DataError(f"colmap: got a quaternion that is not of length 1 ({where})")
        if fields[8] not in cameras:
            raise DataError(
                f"colmap: got camera {shown(fields[8])}, expected one of cameras.txt ({where})"
            )
        poses.append(world_to_camera(*values))
        intrinsics.append(cameras[fields[8]])
        names.append(fields[9])
    order = frame_order(names, frames, folder.name)
    w2c = np.stack([poses[i] for i in order])
    c2w = square_poses(w2c, inverted=True, where=folder.name)
    return c2w, np.array([intrinsics[i] for i in order])


def read_cameras(file: Path, size: tuple[int, int]) -> dict[str, list[float]]:
    """Return camera id -> fx, fy, cx, cy of cameras.txt."""
    cameras = {}
    for number, line in lines_of(file):
        if not line.strip():
            continue
        where = f"line {number} of {file.parent.name}/cameras.txt"
        key, model, *rest = (*line.split(), "")
        if model not in PARAMETERS:
            raise DataError(
                f"colmap: got camera model {shown(model)[1:-1]}, expected one of"
                f" {sorted(PARAMETERS)} ({where}). Fix: undistort first"
            )
        values = numbers(rest[:-1], where)
        if len(values) != 2 + max(PARAMETERS[model]) + 1 or key in cameras:
            raise DataError(
                f"colmap: got a {model} of {len(values)} numbers or an id that comes twice,"
                f" expected WIDTH HEIGHT and {max(PARAMETERS[model]) + 1} parameters ({where})"
            )
        width, height = values[:2]
        if (height, width) != size:
            raise DataError(
                f"colmap: got pictures of {width:g}x{height:g}, expected the video's"
                f" {size[1]}x{size[0]} ({where}). Fix: run COLMAP on the video's own frames, or"
                f" scale width, height and parameters by {size[1] / width if width else 0:g}"
            )
        cameras[key] = [values[2 + i] for i in PARAMETERS[model]]
    return cameras


def image_lines(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of each image; lines of points are told by their columns."""
    for number, line in lines_of(file):
        fields = line.split(maxsplit=HEADER - 1)
        if not fields or is_points(line.split()):
            continue
        if len(fields) < HEADER:
            raise DataError(
                f"colmap: got {len(fields)} columns, expected {HEADER} of an image or three for"
                f" each point (line {number} of {file.parent.name}/images.txt)"
            )
        yield number, fields


def is_points(fields: list[str]) -> bool:
    """Return True for X Y POINT3D_ID, any number of times."""
    if len(fields) % 3:
        return False
    try:
        _ = [float(value) for value in fields]
    except ValueError:
        return False
    return True


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines of a file that are no comments."""
    text = read_text(file, "colmap")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            yield number, line


def numbers(fields: list[str], where: str) -> list[float]:
    """Convert columns to finite numbers."""
    try:
        values = [float(value) for value in fields]
    except ValueError as error:
        raise DataError(f"colmap: {error}, expected numbers ({where})") from error
    if not np.isfinite(values).all():
        raise DataError(f"colmap: got NaN or infinite numbers ({where})")
    return values


def world_to_camera(
    w: float, x: float, y: float, z: float, tx: float, ty: float, tz: float
) -> NDArray[np.float64]:
    """Return [4, 4] of a unit quaternion and a translation."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), tx],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), ty],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), tz],
            [0, 0, 0, 1],
        ]
    )


def frame_order(names: list[str], frames: int, where: str) -> list[int]:
    """Return the position in `names` of each frame, in the order of the frames' numbers.

    Raises:
        DataError: names without a number or of several series, frames that are missing or come
        twice.
    """
    numbered: dict[int, int] = {}
    series = set()
    for place, name in enumerate(names):
        stem = PurePosixPath(name.replace("\\", "/")).stem
        found = NUMBER.search(stem)
        if found is None or len(found[0]) > 18:
            raise DataError(
                f"colmap: got an image {shown(name)}, expected the frame's number in its name"
                f" ({where})"
            )
        number = int(found[0])
        series.add((stem[: found.start()], stem[found.end() :]))
        if number in numbered:
            raise DataError(
                f"colmap: got frame {number} twice, as {shown(names[numbered[number]])} and"
                f" {shown(name)}, expected one image for each frame ({where})"
            )
        numbered[number] = place
    if len(series) > 1:
        raise DataError(
            f"colmap: got images of {len(series)} series, as {shown(names[0])} and others, expected"
            f" names that differ in the frame's number alone ({where})"
        )
    first, last = min(numbered, default=0), max(numbered, default=-1)
    missing = last - first + 1 - len(numbered)
    if missing or len(numbered) != frames:
        some = (n for n in range(first, last) if n not in numbered)
        which = [str(n) for n, _ in zip(some, range(5))]
        gaps = f"; numbers {', '.join(which)}{' ...' if missing > 5 else ''} are missing"
        raise DataError(
            f"colmap: got {len(numbered)} images numbered {first} to {last}, expected one for each"
            f" of the video's {frames} frames{gaps if missing else ''} ({where}). Fix: register all"
            " frames, or cut the video where they are lost"
        )
    return [numbered[number] for number in range(first, last + 1)]
