"""Estimate the camera path of a video, by one of several estimators behind one interface.

An estimator is a row of a table, name -> "module:function"; another package adds one by an entry
point of the group `wm_train.pose_estimators`. It is asked for as `<name>` or `<name>:<argument>`;
the function takes the argument, None without one, and returns a `PoseEstimator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.registry import Registry, load, names

ESTIMATORS = Registry(
    "poses",
    "wm_train.pose_estimators",
    {
        "given": "wm_train.evaluation.poses.given:given",
        "map": "wm_train.evaluation.poses.keyframes:keyframes",
        "colmap": "wm_train.evaluation.poses.colmap:colmap",
        "command": "wm_train.evaluation.poses.command:command",
    },
)


# c2w [4, 4], intrinsics [4], (height, width) -> depth [height, width] of that view, in metres
Surface = Callable[[NDArray[np.float64], NDArray[np.float64], tuple[int, int]], NDArray[np.float64]]


@dataclass(frozen=True)
class KeyFrames:
    """Hold pictures of the scene whose depth and pose are known.

    video [K, H, W, 3] uint8; depth [K, H, W] metres along the camera's z axis, NaN where unknown;
    c2w [K, 4, 4]; intrinsics [K, 4] fx, fy, cx, cy in pixels; surface: the exact depth of any view,
    where the scene's geometry is known.
    """

    video: NDArray[np.uint8]
    depth: NDArray[np.float64]
    c2w: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    surface: Surface | None = None


@dataclass(frozen=True)
class KnownScene:
    """Hold what an estimator may know besides the video: never the path that it is to find.

    key: the clip's name; intrinsics [F, 4] in pixels; first [4, 4]: the pose of frame 0, which is
    given to the model; frames: the scene's map, None without one.
    """

    key: str
    intrinsics: NDArray[np.float64]
    first: NDArray[np.float64]
    frames: KeyFrames | None = None


@dataclass(frozen=True)
class PoseTrack:
    """Hold an estimated path.

    c2w [F, 4, 4], rows of NaN where the pose is unknown; metric: in the truth's metres and world,
    so that nothing needs to be aligned; confidence [F], 0 to 1; name: of the estimator; seconds: it
    took; reason: why no frame has a pose, else "".
    """

    c2w: NDArray[np.float64]
    metric: bool
    confidence: NDArray[np.float64]
    name: str
    seconds: float
    reason: str = ""


class PoseEstimator(Protocol):
    """Find the path of a video [F, H, W, 3] uint8 of `fps` frames a second."""

    def estimate(self, video: NDArray[np.uint8], fps: float, known: KnownScene) -> PoseTrack:
        """Return the path; frames without a pose are NaN, and no error."""
        ...


def make_estimator(text: str) -> PoseEstimator:
    """Make the estimator `<name>` or `<name>:<argument>`. Raises DataError for an unknown name, a
    missing package or a wrong argument."""
    name, _, argument = text.partition(":")
    made: PoseEstimator = load(ESTIMATORS, name)(argument or None)
    return made


def estimator_names() -> tuple[str, ...]:
    """Return the names of all estimators, those of other packages last."""
    return names(ESTIMATORS)


def no_track(frames: int, name: str, reason: str, seconds: float = 0.0) -> PoseTrack:
    """Return a path without any pose, and why."""
    poses = np.full((frames, 4, 4), np.nan)
    return PoseTrack(poses, False, np.zeros(frames), name, seconds, reason)
