"""Check the camera errors against closed forms, gauges and evo's absolute pose error."""

from __future__ import annotations

import numpy as np
import pytest

from wm_train.evaluation.metrics.cameras import camera_errors, pose_errors
from wm_train.evaluation.metrics.trajectory import trajectory_accuracy

F = 24


def about(axis: int, degrees: float) -> np.ndarray:
    """Return a rotation about x, y or z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return turn


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def path(rng: np.random.Generator) -> np.ndarray:
    """Return a walk in space that turns, [F, 4, 4]."""
    poses = np.tile(np.eye(4), (F, 1, 1))
    turn = random_rotation(rng)
    for row in poses:
        turn = turn @ about(1, rng.normal(3, 5)) @ about(0, rng.normal(0, 2))
        row[:3, :3] = turn
    poses[:, :3, 3] = np.cumsum(rng.normal(size=(F, 3)), axis=0)
    return poses


def moved(poses: np.ndarray, scale: float, turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the same path in another world."""
    other = poses.copy()
    other[:, :3, :3] = turn @ poses[:, :3, :3]
    other[:, :3, 3] = scale * poses[:, :3, 3] @ turn.T + shift
    return other


def values(errors) -> list[float | None]:
    return [s.value for s in (errors.rot_err_deg, errors.trans_err_m, errors.cam_mc)]


@pytest.mark.parametrize("alignment", ["rotations", "umeyama"])
@pytest.mark.parametrize("seed", range(3))
def test_a_path_in_another_world_and_scale_has_no_error(alignment, seed):
    rng = np.random.default_rng(seed)
    truth = path(rng)
    same = moved(truth, rng.uniform(0.1, 5), random_rotation(rng), rng.normal(size=3))
    assert max(values(camera_errors(truth, same, alignment))) < 1e-10


@pytest.mark.parametrize("alignment", ["rotations", "umeyama", "none"])
def test_the_world_frame_of_either_path_does_not_count(alignment):
    rng = np.random.default_rng(5)
    truth, found = path(rng), path(rng)
    turn, shift = random_rotation(rng), rng.normal(size=3)
    plain = values(camera_errors(truth, found, alignment))
    for pair in ((moved(truth, 1, turn, shift), found), (truth, moved(found, 1, turn, shift))):
        assert values(camera_errors(*pair, alignment)) == pytest.approx(plain, abs=1e-10)
    assert plain[0] > 1


def test_a_straight_walk_is_exact_by_rotations_and_has_no_number_by_centres():
    truth = np.tile(np.eye(4), (F, 1, 1))
    truth[:, 2, 3] = np.linspace(0, 3, F)
    assert max(values(camera_errors(truth, truth))) < 1e-12
    straight = camera_errors(truth, truth, "umeyama")
    assert values(straight) == [None] * 3
    assert "straight" in straight.rot_err_deg.reason
    turning = np.tile(np.eye(4), (F, 1, 1))
    turning[:, :3, :3] = [about(1, 3 * i) for i in range(F)]
    assert max(values(camera_errors(turning, turning))) < 1e-12
    assert "stands still" in camera_errors(turning, turning, "umeyama").rot_err_deg.reason


def test_a_twist_of_each_camera_is_its_angle_in_degrees_and_a_shift_its_length():
    truth = path(np.random.default_rng(1))
    twisted, shifted = truth.copy(), truth.copy()
    twisted[:, :3, :3] = truth[:, :3, :3] @ about(2, 5.0)
    shifted[:, :3, 3] += 0.3 * np.array([2, -1, 2]) / 3
    rotation, translation, matrix = pose_errors(truth, twisted)
    assert rotation == pytest.approx(5.0, abs=1e-10)
    assert translation.max() == 0
    # |R (I - D)|_F of a rotation by t is 2 sqrt(2) sin(t/2)
    assert matrix == pytest.approx(8**0.5 * np.sin(np.radians(2.5)), abs=1e-12)
    rotation, translation, matrix = pose_errors(truth, shifted)
    assert rotation.max() < 1e-12
    assert translation == pytest.approx(0.3, abs=1e-12)
    assert matrix == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_umeyama_errors_are_those_of_evo(seed):
    trajectory = pytest.importorskip("evo.core.trajectory", reason="evo is not installed")
    from evo.core import metrics

    rng = np.random.default_rng(seed)
    truth, found = path(rng), path(rng)
    first = [np.linalg.inv(poses[0]) @ poses for poses in (truth, found)]
    theirs = [trajectory.PosePath3D(poses_se3=list(poses)) for poses in first]
    theirs[1].align(theirs[0], correct_scale=True)
    ours = values(camera_errors(truth, found, "umeyama"))
    relation = metrics.PoseRelation
    for value, kind in zip(
        ours,
        (relation.rotation_angle_deg, relation.translation_part, relation.full_transformation),
        strict=True,
    ):
        error = metrics.APE(kind)
        error.process_data((theirs[0], theirs[1]))
        expected = error.get_statistic(metrics.StatisticsType.mean)
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_released_alignment_is_its_formula_in_world_to_camera_terms():
    rng = np.random.default_rng(2)
    truth, found = path(rng), path(rng)
    w2c, w2c_truth = (np.linalg.inv(np.linalg.inv(p[0]) @ p) for p in (found, truth))
    turn, move = w2c[:, :3, :3], w2c[:, :3, 3]
    u, _, vt = np.linalg.svd(np.mean([a.T @ b for a, b in zip(w2c_truth[:, :3, :3], turn)], 0))
    fit = vt.T @ u.T
    a = np.array([r.T @ t for r, t in zip(turn, move)])
    b = np.array([r.T @ t for r, t in zip(turn, w2c_truth[:, :3, 3])])
    scale = ((a - a.mean(0)) * (b - b.mean(0))).sum() / ((a - a.mean(0)) ** 2).sum()
    shift = b.mean(0) - scale * a.mean(0)
    wanted = w2c.copy()
    wanted[:, :3, :3] = turn @ fit
    wanted[:, :3, 3] = scale * move + turn @ shift
    assert np.linalg.det(fit) == pytest.approx(1)
    got = np.linalg.inv(truth[0]) @ camera_errors(truth, found).aligned
    assert np.abs(got - np.linalg.inv(wanted)).max() < 1e-10


def test_unknown_poses_lower_the_coverage_and_never_change_the_mean():
    truth = path(np.random.default_rng(3))
    found = truth.copy()
    found[1::2, :3, 3] += 0.4
    whole = camera_errors(truth, found, "none")
    part = found.copy()
    part[[5, 11]] = np.nan
    holes = camera_errors(truth, part, "none")
    assert (holes.trans_err_m.n, holes.trans_err_m.coverage) == (F - 2, (F - 2) / F)
    kept = np.delete(whole.translation, [5, 11])
    assert holes.trans_err_m.value == pytest.approx(kept.mean(), abs=1e-12)
    part[: F // 2 + 1] = np.nan
    lost = camera_errors(truth, part, "none")
    assert values(lost) == [None] * 3
    assert "expected at least 50%" in lost.rot_err_deg.reason
    part[:] = np.nan
    assert values(camera_errors(truth, part)) == [None] * 3


def steps(translations, degrees, axis=1) -> np.ndarray:
    """Return the path of these steps, each in the axes of the first camera, about one axis."""
    poses = np.tile(np.eye(4), (len(translations) + 1, 1, 1))
    for i, (step, angle) in enumerate(zip(translations, degrees, strict=True)):
        poses[i + 1, :3, :3] = poses[i, :3, :3] @ about(axis, angle)
        poses[i + 1, :3, 3] = poses[i, :3, 3] + step
    return poses


def test_trajectory_accuracy_of_own_reversed_and_orthogonal_steps():
    rng = np.random.default_rng(4)
    moves, angles = rng.normal(size=(9, 3)), rng.uniform(1, 20, 9)
    truth = steps(moves, angles)
    own = trajectory_accuracy(truth, moved(truth, 1, random_rotation(rng), rng.normal(size=3)))
    assert (own.passed.value, own.mean.value, own.signed.value) == pytest.approx((1, 1, 1))
    back = trajectory_accuracy(truth, steps(-moves, -angles))
    assert (back.passed.value, back.mean.value, back.signed.value) == pytest.approx((1, 1, -1))
    across = np.cross(moves, rng.normal(size=3))
    crossed = trajectory_accuracy(truth, steps(across, angles, axis=0))
    assert crossed.passed.value == 0
    assert crossed.mean.value == pytest.approx(0, abs=1e-12)


def test_standing_still_together_is_right_and_alone_is_wrong():
    still, walk = steps(np.zeros((4, 3)), [0] * 4), steps(np.ones((4, 3)), [0] * 4)
    assert trajectory_accuracy(walk, walk).mean.value == pytest.approx(1)
    assert trajectory_accuracy(walk, still).mean.value == pytest.approx(0.5)
    unknown = walk.copy()
    unknown[2] = np.nan
    score = trajectory_accuracy(walk, unknown).mean
    assert (score.value, score.n, score.coverage) == (pytest.approx(1), 2, 0.5)
