"""Align a picture with a map of the scene, by its brightness alone.

Points of key frames with known depth are projected into the picture; the pose is moved until they
are as bright there as in their key frame (direct visual odometry, Engel et al. 2018, without
bundle adjustment). A point's picture coordinates are compared at decreasing blur, so that a start
that is many pixels off still finds its way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLURS = (8.0, 4.0, 2.0, 1.0)  # pixels
ROUNDS = 12  # Gauss-Newton steps at each blur
HUBER = 12.0  # grey levels: larger differences count with their size, not its square
EDGE = 0.15  # share by which depth may change from pixel to pixel: more is the edge of a thing
LEAST_SLOPE = 2.0  # grey levels a pixel: fainter points do not hold a pose
MOST_POINTS = 2500  # of a key frame
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Hold points of one key frame: world [n, 3], and their brightness [n] at each blur."""

    world: Array
    grey: tuple[Array, ...]


@dataclass(frozen=True)
class Fit:
    """Hold an aligned pose w2c [4, 4], the correlation of brightness there, the share of points
    that are inside the picture, and the standard errors of rotation (degrees) and centre (m)."""

    w2c: Array
    correlation: float
    seen: float
    rotation_deg: float
    centre_m: float


def blurred(picture: NDArray[np.uint8]) -> tuple[Array, ...]:
    """Return the picture's brightness [H, W] at each blur."""
    import cv2

    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return tuple(cv2.GaussianBlur(grey, (0, 0), blur) for blur in BLURS)


def points_of(picture: NDArray[np.uint8], depth: Array, c2w: Array, lens: Array) -> Points:
    """Return the points of a key frame where brightness changes and depth does not jump."""
    levels = blurred(picture)
    slope = np.hypot(*np.gradient(levels[-1]))
    jump = np.hypot(*np.gradient(depth)) / depth
    good = np.isfinite(depth) & (slope > LEAST_SLOPE) & (jump < EDGE)
    rows, columns = np.nonzero(good)
    if len(rows) > MOST_POINTS:
        keep = np.linspace(0, len(rows) - 1, MOST_POINTS).astype(int)
        rows, columns = rows[keep], columns[keep]
    world = lifted(columns + 0.5, rows + 0.5, depth[rows, columns], c2w, lens)
    return Points(world, tuple(level[rows, columns].astype(np.float64) for level in levels))


def lifted(x: Array, y: Array, depth: Array, c2w: Array, lens: Array) -> Array:
    """Return the world points [n, 3] at picture coordinates x, y (a pixel's centre is at +0.5) and
    depth along the camera's axis."""
    fx, fy, cx, cy = lens
    own = np.stack([(x - cx) / fx * depth, (y - cy) / fy * depth, depth], axis=1)
    return np.asarray(own @ c2w[:3, :3].T + c2w[:3, 3])


def fit_pose(
    levels: tuple[Array, ...], lens: Array, w2c: Array, points: tuple[Points, ...]
) -> Fit | None:
    """Move w2c until the points' brightness is that of the picture; None if too few are seen."""
    world = np.concatenate([one.world for one in points])
    fit = None
    for place, level in enumerate(levels):
        grey = np.concatenate([one.grey[place] for one in points])
        slopes = np.gradient(level)
        for _ in range(ROUNDS):
            found = one_step(level, slopes, lens, w2c, world, grey)
            if found is None:
                return None
            w2c, step, fit = found
            if np.abs(step).max() < 1e-5:
                break
    return fit


def one_step(
    level: Array, slopes: list[Array], lens: Array, w2c: Array, world: Array, grey: Array
) -> tuple[Array, Array, Fit] | None:
    """Take one Gauss-Newton step; return the new pose, the step (centre, rotation) and the fit at
    the old pose, or None if too few points are seen."""
    import cv2

    fx, fy, cx, cy = lens
    own = world @ w2c[:3, :3].T + w2c[:3, 3]
    z = np.maximum(own[:, 2], 1e-6)
    # a pixel's centre is at +0.5 of the camera's coordinates, and at +0 of an array's
    x, y = fx * own[:, 0] / z + cx - 0.5, fy * own[:, 1] / z + cy - 0.5
    height, width = level.shape
    seen = (own[:, 2] > 0.05) & (x > 1) & (y > 1) & (x < width - 2) & (y < height - 2)
    if seen.sum() < 60:
        return None
    own, z, x, y, wanted = own[seen], z[seen], x[seen], y[seen], grey[seen]
    maps = x.astype(np.float32)[None], y.astype(np.float32)[None]
    here, down, right = (
        cv2.remap(image.astype(np.float32), *maps, cv2.INTER_LINEAR)[0].astype(np.float64)
        for image in (level, *slopes)
    )
    gain = float(np.polyfit(here, wanted, 1)[0]) if np.ptp(here) > 1 else 1.0
    gain = min(max(gain, 0.5), 2.0)  # of contrast, which a sample may have lost
    error = gain * (here - here.mean()) - (wanted - wanted.mean())
    weight = 1 / np.maximum(1.0, np.abs(error) / HUBER)
    gx, gy = gain * right * fx / z, gain * down * fy / z
    gz = -(gx * own[:, 0] + gy * own[:, 1]) / z
    jacobian = np.stack([gx, gy, gz], axis=1)
    jacobian = np.concatenate([jacobian, np.cross(own, jacobian)], axis=1)
    hessian = (jacobian * weight[:, None]).T @ jacobian
    hessian += 1e-6 * np.trace(hessian) / 6 * np.eye(6)
    step = -np.linalg.solve(hessian, (jacobian * weight[:, None]).T @ error)
    correlation = float(np.corrcoef(here, wanted)[0, 1]) if np.ptp(here) > 0 else 0.0
    spread = np.sqrt(np.diag(np.linalg.inv(hessian)) * (weight * error**2).mean())
    fit = Fit(
        w2c,
        correlation,
        float(seen.mean()),
        float(np.degrees(np.linalg.norm(spread[3:]))),
        float(np.linalg.norm(spread[:3])),
    )
    return moved(w2c, step), step, fit


def moved(w2c: Array, step: Array) -> Array:
    """Return the pose after a small move [6] of the camera's own points: shift, then rotation."""
    import cv2

    change = np.eye(4)
    change[:3, :3] = cv2.Rodrigues(step[3:])[0]
    change[:3, 3] = step[:3]
    return np.asarray(change @ w2c)
