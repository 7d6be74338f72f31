"""Find a video's path in a map of the scene: key frames with depth and pose (`map`).

A frame starts from the pose of the frame before it. Where the scene's geometry is known, it is
aligned with the view that the scene would give (`views.py`), which also finds the camera of a
blurred picture without corners, as a codec or a model makes them. Else it is aligned with the
nearest key frames by brightness; where that fails, corners of the frame (SIFT, Lowe 2004) are
looked up in all key frames, and the pose follows from the 3-D points found (PnP with RANSAC),
aligned again. The wanted path is used nowhere but in its first pose, so errors do not shrink
towards it; the result is metric and does not drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from wm_train.evaluation.poses import KeyFrames, KnownScene, PoseEstimator, PoseTrack, no_track
from wm_train.evaluation.poses.alignment import (
    Array,
    Fit,
    Points,
    blurred,
    fit_pose,
    lifted,
    points_of,
)
from wm_train.evaluation.poses.views import Match, find_view

NEAREST = 2  # key frames that a frame is aligned with
LEAST_INLIERS = 15
# what an alignment must reach: correlation of brightness, share of points seen, standard errors
# (on 405 true frames of ViZDoom 99 of 100 right poses have standard errors below 0.055 degrees; of
# poses that are more than a degree wrong one of eleven passes all four; pictures of a codec or a
# model have larger standard errors at right poses)
CORRELATION, SEEN, ROTATION_DEG, CENTRE_M = 0.75, 0.25, 0.4, 0.05
RATIO = 0.8  # of a corner's distance to its best and to its second match (Lowe 2004, §7.1)
PIXELS = 2.0  # by which a match may miss


@dataclass(frozen=True)
class Corners:
    """Hold the corners of one key frame: descriptors [n, 128] and world points [n, 3]."""

    descriptors: NDArray[np.float32]
    world: Array


@dataclass(frozen=True)
class Map:
    """Hold the key frames as alignment and look-up need them."""

    c2w: Array
    points: tuple[Points, ...]
    corners: tuple[Corners, ...]


@dataclass(frozen=True)
class KeyFrameEstimator:
    """Estimate paths in the scene's key frames."""

    def estimate(self, video: NDArray[np.uint8], fps: float, known: KnownScene) -> PoseTrack:
        """Return the path; no frame has a pose without a map of the scene."""
        if known.frames is None:
            reason = "the clip has no key frames with depth. Fix: recording=<folder>"
            return no_track(len(video), "map", reason)
        began = time.monotonic()
        frames, surface = known.frames, known.frames.surface
        find: Callable[[NDArray[np.uint8], Array, Array], Fit | Match | None]
        if surface is not None:
            find = partial(find_view, frames, surface)
        else:
            find = partial(locate, build_map(frames))
        path = np.full((len(video), 4, 4), np.nan)
        confidence = np.zeros(len(video))
        last: Array = np.asarray(np.linalg.inv(known.first), np.float64)
        for number, (picture, lens) in enumerate(zip(video, known.intrinsics, strict=True)):
            fit = find(picture, lens, last)
            if fit is not None:
                last, confidence[number] = fit.w2c, max(0.0, fit.correlation)
                path[number] = np.linalg.inv(fit.w2c)
        reason = "" if confidence.any() else "no frame was found in the scene's key frames"
        return PoseTrack(path, True, confidence, "map", time.monotonic() - began, reason)


def keyframes(argument: str | None) -> PoseEstimator:
    """Build the estimator. Raises DataError without OpenCV, or for an argument: it takes none."""
    if argument:
        raise DataError(f"poses map: got {argument!r}, expected nothing behind map. Fix: poses=map")
    opencv()
    return KeyFrameEstimator()


def opencv() -> Any:
    """Return OpenCV. Raises DataError when it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            f"poses map: got {error}, expected OpenCV. Fix: pip install 'wm-train[evaluate]'"
        ) from error
    return cv2


def build_map(frames: KeyFrames) -> Map:
    """Build the map of all key frames."""
    rows = list(zip(frames.video, frames.depth, frames.c2w, frames.intrinsics, strict=True))
    return Map(
        frames.c2w, tuple(points_of(*row) for row in rows), tuple(corners_of(*row) for row in rows)
    )


def corners_of(picture: NDArray[np.uint8], depth: Array, c2w: Array, lens: Array) -> Corners:
    """Return the corners of a key frame whose depth is known."""
    places, descriptors = detect(picture)
    rows, columns = (
        (places[:, 1] - 0.5).round().astype(int),
        (places[:, 0] - 0.5).round().astype(int),
    )
    rows, columns = rows.clip(0, len(depth) - 1), columns.clip(0, depth.shape[1] - 1)
    far = depth[rows, columns]
    good = np.isfinite(far)
    world = lifted(places[good, 0], places[good, 1], far[good], c2w, lens)
    return Corners(descriptors[good], world)


def detect(picture: NDArray[np.uint8]) -> tuple[Array, NDArray[np.float32]]:
    """Return picture coordinates [n, 2] and descriptors [n, 128] of a picture's corners."""
    cv2 = opencv()
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    found, descriptors = cv2.SIFT_create(contrastThreshold=0.01).detectAndCompute(grey, None)
    if descriptors is None:
        return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
    return np.array([corner.pt for corner in found], np.float64) + 0.5, descriptors


def locate(scene: Map, picture: NDArray[np.uint8], lens: Array, last: Array) -> Fit | None:
    """Return the pose of a picture, first near w2c `last`, then anywhere in the map."""
    levels = blurred(picture)
    fit = aligned(scene, levels, lens, last)
    if fit is None:
        start = look_up(scene, picture, lens)
        fit = None if start is None else aligned(scene, levels, lens, start)
    return fit


def aligned(scene: Map, levels: tuple[Array, ...], lens: Array, start: Array) -> Fit | None:
    """Return the pose that alignment from w2c `start` finds, None where it is not to be trusted."""
    fit = fit_pose(levels, lens, start, nearest(scene, start))
    if fit is not None:  # it may have moved to where other key frames are nearer
        fit = fit_pose(levels[2:], lens, fit.w2c, nearest(scene, fit.w2c, skip=2))
    good = (
        fit is not None
        and fit.correlation >= CORRELATION
        and fit.seen >= SEEN
        and fit.rotation_deg <= ROTATION_DEG
        and fit.centre_m <= CENTRE_M
    )
    return fit if good else None


def nearest(scene: Map, w2c: Array, skip: int = 0) -> tuple[Points, ...]:
    """Return the points of the key frames whose view is nearest (30 degrees count as a metre),
    without those of the first `skip` blurs."""
    pose = np.linalg.inv(w2c)
    distance = np.linalg.norm(scene.c2w[:, :3, 3] - pose[:3, 3], axis=1)
    cosine = np.clip(scene.c2w[:, :3, 2] @ pose[:3, 2], -1, 1)
    order = np.argsort(distance + np.degrees(np.arccos(cosine)) / 30, kind="stable")[:NEAREST]
    return tuple(Points(scene.points[i].world, scene.points[i].grey[skip:]) for i in order)


def look_up(scene: Map, picture: NDArray[np.uint8], lens: Array) -> Array | None:
    """Return w2c of a picture from its corners in the three key frames that share most of them."""
    cv2 = opencv()
    places, descriptors = detect(picture)
    matches = []
    for corners in scene.corners:
        if len(descriptors) < 2 or len(corners.descriptors) < 2:
            continue
        pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(descriptors, corners.descriptors, k=2)
        good = [a for a, b in pairs if a.distance < RATIO * b.distance]
        matches.append(
            (places[[m.queryIdx for m in good]], corners.world[[m.trainIdx for m in good]])
        )
    best = sorted(matches, key=lambda match: -len(match[0]))[:3]
    if sum(len(match[0]) for match in best) < LEAST_INLIERS:
        return None
    seen, world = (np.concatenate([match[i] for match in best]) for i in (0, 1))
    fx, fy, cx, cy = lens
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    cv2.setRNGSeed(0)
    found, turn, shift, inliers = cv2.solvePnPRansac(
        world, seen, matrix, None, iterationsCount=500, reprojectionError=PIXELS
    )
    if not found or inliers is None or len(inliers) < LEAST_INLIERS:
        return None
    own = inliers[:, 0]
    turn, shift = cv2.solvePnPRefineLM(world[own], seen[own], matrix, None, turn, shift)
    w2c = np.eye(4)
    w2c[:3, :3], w2c[:3, 3] = cv2.Rodrigues(turn)[0], shift[:, 0]
    return w2c
