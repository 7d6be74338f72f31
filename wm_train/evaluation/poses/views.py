"""Align a picture with the view that the scene would give: key frames carried to a pose through
the scene's known geometry.

What is seen from a pose is exact, also behind the edge of a pillar: depth comes from the geometry,
and each point has its colour from the nearest key frame that sees it. The pose is moved until view
and picture agree, from coarse to fine (dense image alignment by Gauss-Newton).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.poses import KeyFrames, Surface
from wm_train.evaluation.poses.alignment import moved

Array = NDArray[np.float64]
# (by how much pictures are shrunk, Gauss-Newton steps)
LEVELS = ((4, 10), (2, 6), (1, 4))
BLUR = 1.5  # pixels, at each level
HUBER = 10.0  # levels of a colour: larger differences count with their size, not its square
NEAREST = 4  # key frames that colours are taken from
BEHIND = 0.03  # share of its depth by which a point may lie behind what a key frame sees there
DONE = 1e-4  # metres and radians: a smaller step is the last of its level
FARTHEST = 2.0  # metres and radians: with a larger step the picture does not hold the pose
# what a match must reach: correlation of colours, and share of the picture that was compared
CORRELATION, SEEN = 0.75, 0.25
TURNS = (0.0, 8.0, -8.0, 16.0, -16.0)  # degrees to the right at which a lost camera is looked for


@dataclass(frozen=True)
class View:
    """Hold a view: colours [h, w, 3], metres [h, w] along the z axis, known: which pixels some key
    frame has seen."""

    colours: NDArray[np.float32]
    metres: Array
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class Match:
    """Hold an aligned pose w2c [4, 4], the correlation of colours there, and the share of the
    picture that some key frame has seen."""

    w2c: Array
    correlation: float
    seen: float


def find_view(
    frames: KeyFrames, surface: Surface, picture: NDArray[np.uint8], lens: Array, last: Array
) -> Match | None:
    """Return the pose of a picture near w2c `last`, None where no view agrees with it."""
    for turn in TURNS:
        start = moved(last, np.array([0.0, 0.0, 0.0, 0.0, -np.radians(turn), 0.0]))
        match = align_view(frames, surface, picture, lens, start)
        if match is not None and match.correlation >= CORRELATION and match.seen >= SEEN:
            return match
    return None


def align_view(
    frames: KeyFrames, surface: Surface, picture: NDArray[np.uint8], lens: Array, start: Array
) -> Match | None:
    """Move w2c from `start` until the scene's view is the picture [H, W, 3]; None where the pose
    runs away."""
    match, w2c = None, start
    for shrink, rounds in LEVELS:
        small, own = shrunk(picture, lens, shrink)
        chosen = nearest(frames, w2c)
        for _ in range(rounds):
            view = view_from(frames, chosen, surface, w2c, own, shrink, small.shape[:2])
            found = one_step(view, small, own, w2c)
            if found is None:
                return None
            w2c, step, match = found
            if np.abs(step).max() < DONE:
                break
    return match


def shrunk(picture: NDArray[np.uint8], lens: Array, shrink: int) -> tuple[NDArray, Array]:
    """Return the picture at a level, float32 and blurred, and its intrinsics."""
    import cv2

    height, width = picture.shape[0] // shrink, picture.shape[1] // shrink
    scale = np.array([width / picture.shape[1], height / picture.shape[0]])
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    return cv2.GaussianBlur(small, (0, 0), BLUR), lens * np.tile(scale, 2)


def nearest(frames: KeyFrames, w2c: Array) -> Array:
    """Return the key frames whose view is nearest (30 degrees count as a metre), in order."""
    pose = np.linalg.inv(w2c)
    distance = np.linalg.norm(frames.c2w[:, :3, 3] - pose[:3, 3], axis=1)
    cosine = np.clip(frames.c2w[:, :3, 2] @ pose[:3, 2], -1, 1)
    order = np.argsort(distance + np.degrees(np.arccos(cosine)) / 30, kind="stable")
    return np.asarray(order[:NEAREST])


def view_from(
    frames: KeyFrames,
    chosen: Array,
    surface: Surface,
    w2c: Array,
    lens: Array,
    shrink: int,
    size: tuple[int, int],
) -> View:
    """Return what the chosen key frames show of the scene from a pose."""
    import cv2

    c2w: Array = np.asarray(np.linalg.inv(w2c), np.float64)
    depth = surface(c2w, lens, size)
    rays = rays_of(lens, size)
    world = (rays * depth[..., None]).reshape(-1, 3) @ c2w[:3, :3].T + c2w[:3, 3]
    colours = np.zeros((len(world), 3), np.float32)
    missing = np.isfinite(depth).ravel()
    for i in chosen.tolist():
        todo = np.flatnonzero(missing)
        if not len(todo):
            break
        pose, (fx, fy, cx, cy) = np.linalg.inv(frames.c2w[i]), frames.intrinsics[i]
        own = world[todo] @ pose[:3, :3].T + pose[:3, 3]
        z = np.maximum(own[:, 2], 1e-6)
        x, y = fx * own[:, 0] / z + cx - 0.5, fy * own[:, 1] / z + cy - 0.5
        height, width = frames.depth[i].shape
        inside = (own[:, 2] > 0.05) & (x > 0) & (y > 0) & (x < width - 1) & (y < height - 1)
        todo, z, x, y = todo[inside], z[inside], x[inside], y[inside]
        there = frames.depth[i][y.round().astype(int), x.round().astype(int)]
        visible = z < there * (1 + BEHIND)
        todo, x, y = (values[visible] for values in (todo, x, y))
        if len(todo):
            source = cv2.blur(frames.video[i], (shrink, shrink)) if shrink > 1 else frames.video[i]
            across, down = x.astype(np.float32)[None], y.astype(np.float32)[None]
            colours[todo] = np.asarray(cv2.remap(source, across, down, cv2.INTER_LINEAR))[0]
            missing[todo] = False
    known = np.isfinite(depth) & ~missing.reshape(size)
    # a blur over what is known alone
    spread = np.asarray(cv2.GaussianBlur(known.astype(np.float32), (0, 0), BLUR), np.float32)
    soft = np.asarray(cv2.GaussianBlur(colours.reshape(*size, 3), (0, 0), BLUR), np.float32)
    soft /= np.maximum(spread, np.float32(1e-3))[..., None]
    return View(soft, depth, known & (spread > 0.9))


def rays_of(lens: Array, size: tuple[int, int]) -> Array:
    """Return the camera's rays [h, w, 3] through the centres of pixels, 1 along z."""
    fx, fy, cx, cy = lens
    x, y = (np.arange(size[1]) + 0.5 - cx) / fx, (np.arange(size[0]) + 0.5 - cy) / fy
    return np.stack([*np.meshgrid(x, y), np.ones(size)], axis=-1)


def one_step(
    view: View, picture: NDArray[np.float32], lens: Array, w2c: Array
) -> tuple[Array, Array, Match] | None:
    """Take one Gauss-Newton step; return the new pose, the step (centre, rotation) and the match at
    the old pose, or None if too little of the picture is known."""
    import cv2

    size, inside = view.metres.shape, view.known.copy()
    inside[:1], inside[-1:], inside[:, :1], inside[:, -1:] = (False,) * 4
    if inside.mean() < 0.05:
        return None
    # what is seen beside an edge moves with the nearer side
    reach = np.ones((5, 5), np.uint8)
    solid = np.where(np.isfinite(view.metres), view.metres, 1e3)
    near = np.asarray(cv2.erode(solid, reach), np.float64)[inside]
    down, right = (np.gradient(view.colours, axis=axis)[inside] for axis in (0, 1))  # [n, 3]
    shown, wanted = (image[inside].astype(np.float64) for image in (view.colours, picture))
    shown, wanted = shown - shown.mean(axis=0), wanted - wanted.mean(axis=0)
    both = float((shown * wanted).sum())
    gain = min(max(both / max(float((wanted * wanted).sum()), 1e-9), 0.5), 2.0)
    error = shown - gain * wanted  # a sample may have lost contrast
    weight = 1 / np.maximum(1.0, np.abs(error) / HUBER)
    own = rays_of(lens, size)[inside] * near[:, None]
    gx, gy = -right * (lens[0] / near)[:, None], -down * (lens[1] / near)[:, None]
    gz = -(gx * own[:, :1] + gy * own[:, 1:2]) / near[:, None]
    shift = np.stack([gx, gy, gz], axis=-1)  # [n, 3 colours, 3]
    jacobian = np.concatenate([shift, np.cross(own[:, None], shift)], axis=-1).reshape(-1, 6)
    weighted = jacobian * weight.reshape(-1, 1)
    hessian = weighted.T @ jacobian
    hessian += (1e-6 * np.trace(hessian) / 6 + 1e-9) * np.eye(6)
    step = -np.linalg.solve(hessian, weighted.T @ error.ravel())
    if np.abs(step).max() > FARTHEST:
        return None
    size_of_both = float(np.sqrt((shown * shown).sum() * (wanted * wanted).sum()))
    match = Match(w2c, both / max(size_of_both, 1e-9), float(inside.mean()))
    return moved(w2c, step), step, match
