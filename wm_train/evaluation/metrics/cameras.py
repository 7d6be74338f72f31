"""Measure how far an estimated camera path is from the wanted one (SANA-WM App. D.3).

Poses are c2w [F, 4, 4], metres, OpenCV axes. A row of NaN is a frame whose pose is unknown: it
lowers the coverage and is in no mean.

Both paths are first made relative to the first scored frame. `rotations` aligns as the released
evaluator does: a rotation from all orientations, then scale and shift. `umeyama` is the alignment
that the paper states: Sim(3) from the camera centres alone (Umeyama 1991). It cannot know the roll
about a straight path, where an exact estimate may be 90 degrees off: there it gives no number.
`none` leaves a metric estimate as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wm_train.evaluation.metrics.score import Score, mean_score, unknown

Poses = NDArray[np.float64]
ALIGNMENTS = ("rotations", "umeyama", "none")
STRAIGHT = 1e-3  # centres spread less than this share of their length across it: a straight path
LEAST = 0.5  # coverage below which camera errors are no number


@dataclass(frozen=True)
class CameraErrors:
    """Hold the three errors of D.3, and those of each frame.

    rot_err_deg, trans_err_m (in the truth's metres), cam_mc: means over the scored frames.
    rotation, translation, matrix: [F], NaN where unknown. aligned: [F, 4, 4], the estimate in the
    truth's world.
    """

    rot_err_deg: Score
    trans_err_m: Score
    cam_mc: Score
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    matrix: NDArray[np.float64]
    aligned: Poses


def camera_errors(
    truth: Poses, estimate: Poses, alignment: str = "rotations", least: float = LEAST
) -> CameraErrors:
    """Compare an estimated path with the truth, both [F, 4, 4]. Raises ValueError for unlike shapes
    or an unknown alignment."""
    if truth.shape != estimate.shape or truth.shape[1:] != (4, 4):
        raise ValueError(f"poses: got {estimate.shape}, expected [F, 4, 4] as {truth.shape}")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment: got {alignment!r}, expected one of {', '.join(ALIGNMENTS)}")
    known = np.flatnonzero(np.isfinite(estimate).all(axis=(1, 2)))
    aligned = np.full(estimate.shape, np.nan)
    reason = "no frame has an estimated pose"
    if len(known):
        wanted, found = (relative(poses[known]) for poses in (truth, estimate))
        reason = degenerate(wanted, found) if alignment == "umeyama" else ""
    if reason and len(known) < least * len(estimate):
        reason = (
            f"{len(known)} of {len(estimate)} frames have a pose, expected at least {least:.0%}"
        )
    if not reason:
        place = truth[known[0]] if len(known) else np.eye(4)
        aligned[known] = place @ align(wanted, found, alignment)
    rotation, translation, matrix = pose_errors(truth, aligned)
    rot, trans, both = (
        unknown(reason) if reason else mean_score(errors, "frames", least)
        for errors in (rotation, translation, matrix)
    )
    return CameraErrors(rot, trans, both, rotation, translation, matrix, aligned)


def pose_errors(
    truth: Poses, estimate: Poses
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return per frame, [F] each: the angle between the orientations in degrees, the distance of
    the centres, and the Frobenius norm of the difference of [R|t]; nothing is aligned."""
    between = np.einsum("fji,fjk->fik", truth[:, :3, :3], estimate[:, :3, :3])
    return (
        np.degrees(angles(between)),
        np.linalg.norm(truth[:, :3, 3] - estimate[:, :3, 3], axis=1),
        np.linalg.norm(truth[:, :3] - estimate[:, :3], axis=(1, 2)),
    )


def angles(rotations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angle of each rotation [F, 3, 3] in radians, as D.3's arccos of the trace.

    The arctangent of its sine and cosine is the same number: the arccos alone loses half the digits
    near 0, where 1e-16 in the trace is 1e-8 radians.
    """
    skew = np.stack(
        [rotations[:, i, j] - rotations[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], axis=1
    )
    trace = np.trace(rotations, axis1=1, axis2=2)
    return np.arctan2(np.linalg.norm(skew, axis=1), trace - 1)


def relative(poses: Poses) -> Poses:
    """Return poses [F, 4, 4] as seen from the first."""
    return np.linalg.inv(poses[0]) @ poses


def align(truth: Poses, estimate: Poses, alignment: str) -> Poses:
    """Move an estimate without unknown frames onto the truth, [F, 4, 4] each."""
    if alignment == "none":
        return estimate
    rotation, scale, shift = (by_centres if alignment == "umeyama" else by_rotations)(
        truth, estimate
    )
    moved = estimate.copy()
    moved[:, :3, :3] = rotation @ estimate[:, :3, :3]
    moved[:, :3, 3] = scale * estimate[:, :3, 3] @ rotation.T + shift
    return moved


Similarity = tuple[NDArray[np.float64], float, NDArray[np.float64]]


def by_rotations(truth: Poses, estimate: Poses) -> Similarity:
    """Return rotation [3, 3], scale and shift [3] of the released evaluator's alignment.

    It fits w2c rotations R: A = V U^T for the SVD U D V^T of the mean of R_truth^T R_estimate;
    then scale and shift by least squares between a = R_e^T t_e and b = R_e^T t_truth, of w2c
    translations t, and R_e <- R_e A. In c2w terms the world turns by A^T. An estimate that stands
    still has no scale, and needs none: 1.
    """
    w2c_truth, w2c = np.linalg.inv(truth), np.linalg.inv(estimate)
    mean = np.einsum("fji,fjk->ik", w2c_truth[:, :3, :3], w2c[:, :3, :3]) / len(truth)
    u, _, vt = np.linalg.svd(mean)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    turn = vt.T @ flip @ u.T
    a = np.einsum("fji,fj->fi", w2c[:, :3, :3], w2c[:, :3, 3])
    b = np.einsum("fji,fj->fi", w2c[:, :3, :3], w2c_truth[:, :3, 3])
    from_mean = a - a.mean(axis=0)
    spread = float((from_mean**2).sum())
    still = spread <= 1e-18 * max(1.0, float((a**2).sum()))
    scale = 1.0 if still else float((from_mean * (b - b.mean(axis=0))).sum() / spread)
    shift = b.mean(axis=0) - scale * a.mean(axis=0)
    # w2c: x -> R A x' + s t + R T, so the centre -A^T R^T (s t + R T) = A^T (s c - T)
    return turn.T, scale, -turn.T @ shift


def by_centres(truth: Poses, estimate: Poses) -> Similarity:
    """Return rotation [3, 3], scale and shift [3] of the Sim(3) that best moves the estimated
    centres onto the true ones (Umeyama 1991, eq. 40-42)."""
    x, y = estimate[:, :3, 3], truth[:, :3, 3]
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    u, d, vt = np.linalg.svd((y - mean_y).T @ (x - mean_x) / len(x))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = float((d * sign).sum() / ((x - mean_x) ** 2).sum(axis=1).mean())
    return rotation, scale, mean_y - scale * rotation @ mean_x


def degenerate(truth: Poses, estimate: Poses) -> str:
    """Return why centres determine no Sim(3), "" if they do: three that are not on one line."""
    for name, poses in (("true", truth), ("estimated", estimate)):
        centres = poses[:, :3, 3] - poses[:, :3, 3].mean(axis=0)
        spread = np.linalg.svd(centres, compute_uv=False)
        spread = np.append(spread, [0.0, 0.0])
        if spread[0] <= 1e-9:
            return f"the {name} path stands still, so camera centres determine no rotation"
        if spread[1] < STRAIGHT * spread[0]:
            return f"the {name} path is straight, so camera centres leave the roll about it open"
    return ""
