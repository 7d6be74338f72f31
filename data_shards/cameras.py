"""Convert cameras to one form, and check that they can be the cameras of a picture.

One form: c2w [F,4,4] with OpenCV axes in metres, and intrinsics [F,4] fx, fy, cx, cy in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError

FIELD_OF_VIEW = (2.0, 175.0)  # degrees, across the picture and down it
FARTHEST = 1e8  # metres from the origin: more than any place on Earth in any map's coordinates
OFF = 1e-3  # what rounding may add to a rotation


def square_poses(poses: NDArray[np.float64], inverted: bool, where: str) -> NDArray[np.float64]:
    """Convert [F,3,4] or [F,4,4], c2w or (inverted) w2c -> c2w [F,4,4], checked to be rigid."""
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise DataError(
            f"poses: got shape {poses.shape}, expected [F, 3, 4] or [F, 4, 4] ({where})"
        )
    full = np.tile(np.eye(4), (len(poses), 1, 1))
    full[:, : poses.shape[1]] = poses
    if problem := pose_problem(full):
        raise DataError(f"poses: {problem} ({where}). Fix: see its axes, its order and its scale")
    return np.asarray(np.linalg.inv(full) if inverted else full, np.float64)


def square_intrinsics(values: NDArray[np.float64], frames: int, where: str) -> NDArray[np.float64]:
    """Convert [4], [F,4], [3,3] or [F,3,3] -> [F,4]."""
    if values.shape in ((3, 3), (frames, 3, 3)):
        rest = np.stack(
            [values[..., 0, 1], values[..., 1, 0], values[..., 2, 0], values[..., 2, 1]], axis=-1
        )
        if rest.any() or (values[..., 2, 2] != 1).any():
            raise DataError(
                "intrinsics: got a matrix that is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]],"
                f" expected one without skew ({where}). Fix: undistort first"
            )
        values = np.stack(
            [values[..., 0, 0], values[..., 1, 1], values[..., 0, 2], values[..., 1, 2]], axis=-1
        )
    if values.shape not in ((4,), (frames, 4)) or not (values[..., :2] > 0).all():
        raise DataError(
            f"intrinsics: got shape {values.shape}, expected [4], [3, 3], [{frames}, 4] or"
            f" [{frames}, 3, 3] with fx, fy > 0 ({where})"
        )
    return np.broadcast_to(values, (frames, 4)).copy()


def pose_problem(c2w: NDArray[Any]) -> str:
    """Return why [F,4,4] are no poses, '' if they are. A pose is rigid, so is its inverse."""
    if not np.isfinite(c2w).all():
        return "got NaN or infinite numbers, expected finite ones"
    if np.abs(c2w[:, :3, 3]).max(initial=0) > FARTHEST:
        place = np.abs(c2w[:, :3, 3]).max()
        return f"got a camera {place:.3g} metres from the origin, expected at most {FARTHEST:g}"
    rotation = np.asarray(c2w[:, :3, :3], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(initial=0)
    if not error < OFF:
        return f"got rotations off by {error:.3g}, expected rigid OpenCV poses"
    if np.linalg.det(rotation).min(initial=1) < 0:
        return "got mirrored axes, expected rigid OpenCV poses"
    if not np.array_equal(c2w[:, 3], np.tile([0.0, 0, 0, 1], (len(c2w), 1))):
        return "got a last row that is not 0 0 0 1, expected the translation in the last column"
    return ""


def intrinsics_problem(intrinsics: NDArray[Any], height: int, width: int, cropped: int = 0) -> str:
    """Return why [F,4] are not in pixels of a picture of this size, '' if they can be.

    cropped: pixels by which a crop may have moved the principal point out of the picture.
    """
    if not np.isfinite(intrinsics).all():
        return "got NaN or infinite numbers, expected finite ones"
    focal, centre, size = intrinsics[:, :2], intrinsics[:, 2:], np.array([width, height])
    of_picture = f"in pixels of the {width}x{height} picture"
    bad = np.flatnonzero(~((centre > 1 - cropped) & (centre < size - 1 + cropped)).all(axis=1))
    if len(bad):
        cx, cy = centre[bad[0]]
        hint = " (they look divided by its size)" if abs(cx) <= 1 and abs(cy) <= 1 else ""
        return (
            f"got cx, cy = {cx:g}, {cy:g} in frame {bad[0]}, expected a point inside it,"
            f" {of_picture}{hint}"
        )
    with np.errstate(divide="ignore"):
        views = np.degrees(2 * np.arctan(size / 2 / focal))
    low, high = FIELD_OF_VIEW
    bad = np.flatnonzero(~((focal > 0) & (views >= low) & (views <= high)).all(axis=1))
    if len(bad):
        fx, fy = focal[bad[0]]
        return (
            f"got fx, fy = {fx:g}, {fy:g} in frame {bad[0]}, expected a field of view of {low:g} to"
            f" {high:g} degrees, {of_picture}"
        )
    return ""


def camera_problem(
    c2w: NDArray[Any], intrinsics: NDArray[Any], height: int, width: int, cropped: int = 0
) -> str:
    """Return why poses and intrinsics are not those of a camera of such pictures, '' if they
    are."""
    if problem := pose_problem(c2w):
        return f"poses: {problem}"
    problem = intrinsics_problem(intrinsics, height, width, cropped)
    return problem and f"intrinsics: {problem}"
