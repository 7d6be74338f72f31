"""Check the estimators of camera paths on gameplay whose cameras are exact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_shards import record
from data_shards.schema import DataError
from data_shards.sources.recording import RecordingSource
from wm_train.evaluation.metrics.cameras import camera_errors
from wm_train.evaluation.poses import KnownScene, estimator_names, make_estimator
from wm_train.evaluation.scene import Recording, place_of

FPS = 16.0


@pytest.fixture(scope="module")
def clips(gameplay: Path) -> list[tuple]:
    """(video, c2w, known) of the recording's clips."""
    folder = gameplay.parent / "recording"
    source, scenes, found = RecordingSource(folder), Recording(folder), []
    for clip in source.clips[:4]:
        video, c2w, lens = (source.array(clip.key, n) for n in ("video", "c2w", "intrinsics"))
        found.append((video, c2w, KnownScene(clip.key, lens, c2w[0], scenes.scene(clip.key, c2w))))
    return found


@pytest.fixture(scope="module")
def paths(clips) -> list[np.ndarray]:
    """The path that `map` finds of each clip."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    estimator = make_estimator("map")
    tracks = [estimator.estimate(video, FPS, known) for video, _, known in clips]
    assert all(track.metric and not track.reason for track in tracks)
    return [track.c2w for track in tracks]


def test_true_frames_are_found_within_a_third_of_a_degree_and_two_centimetres(clips, paths):
    errors = [camera_errors(c2w, path, "none") for (_, c2w, _), path in zip(clips, paths)]
    assert np.mean([e.rot_err_deg.value for e in errors]) < 0.3
    assert np.mean([np.nanmedian(e.translation) for e in errors]) < 0.02
    assert min(e.rot_err_deg.coverage for e in errors) > 0.85


def test_the_own_path_is_nearer_than_any_other_clips(clips, paths):
    for place, path in enumerate(paths):
        own, *others = [
            camera_errors(clips[(place + step) % len(clips)][1], path, "none").trans_err_m.value
            for step in range(len(clips))
        ]
        assert own < min(others) / 5


@pytest.mark.parametrize("name", ["frozen", "half speed"])
def test_a_video_that_stands_still_or_lags_is_measured_at_its_exact_error(clips, name):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    video, c2w, known = clips[0]
    picks = np.zeros(len(video), int) if name == "frozen" else np.arange(len(video)) // 2
    shown = KnownScene(known.key, known.intrinsics[picks], c2w[0], known.frames)
    found = make_estimator("map").estimate(video[picks], FPS, shown)
    exact, measured = (camera_errors(c2w, path, "none") for path in (c2w[picks], found.c2w))
    assert measured.rot_err_deg.coverage == 1
    assert exact.rot_err_deg.value > 3
    assert measured.rot_err_deg.value == pytest.approx(exact.rot_err_deg.value, abs=0.05)
    assert measured.trans_err_m.value == pytest.approx(exact.trans_err_m.value, abs=0.02)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Callable[[int], tuple]:
    """room(i) -> (video, c2w, known) of a clip recorded in a room whose geometry is known."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    out = tmp_path_factory.mktemp("rooms")

    def clip(number: int) -> tuple:
        count = 1 if number == 0 else 5  # the tests that are not `full` need the first alone
        folder = out / str(count)
        words = ["scenario=rooms", "clips_per_episode=1", "frames=41", f"clips={count}"]
        assert record.main(["vizdoom", f"out={folder}", *words]) == 0  # if it is not there yet
        source, scenes = RecordingSource(folder), Recording(folder)
        key = source.clips[number].key
        video, c2w, lens = (source.array(key, n) for n in ("video", "c2w", "intrinsics"))
        return video, c2w, KnownScene(key, lens, c2w[0], scenes.scene(key, c2w))

    return clip


def measured(video, c2w, known, picks):
    """Errors of the path that `map` finds of these frames, shown one after the other: against
    theirs, and against that of the first frames, beside the exact error of it."""
    shown = KnownScene(known.key, known.intrinsics[picks], c2w[0], known.frames)
    found = make_estimator("map").estimate(video[picks], FPS, shown).c2w
    wanted = c2w[: len(picks)]
    pairs = ((c2w[picks], found), (wanted, found), (wanted, c2w[picks]))
    return [camera_errors(truth, path, "none") for truth, path in pairs]


QUICK = [(0, 6)]
EVERY = [*QUICK, *(pytest.param(n, 41, marks=pytest.mark.full) for n in range(5))]


@pytest.mark.parametrize(("number", "frames"), EVERY)
def test_in_a_room_every_clip_is_found_within_a_third_of_a_degree_and_two_centimetres(
    room, number, frames
):
    own, _, _ = measured(*room(number), np.arange(frames))
    assert own.rot_err_deg.coverage == 1
    assert own.rot_err_deg.value < 0.3
    assert own.trans_err_m.value < 0.02


@pytest.mark.parametrize(("number", "frames"), EVERY)
def test_in_a_room_half_speed_and_a_frozen_frame_are_measured_at_their_exact_error(
    room, number, frames
):
    clip = room(number)
    for picks in (np.arange(frames) // 2, np.zeros(min(frames, 2), int)):
        own, wrong, exact = measured(*clip, picks)
        assert own.rot_err_deg.coverage == 1
        assert wrong.rot_err_deg.value == pytest.approx(exact.rot_err_deg.value, abs=0.05)
        assert wrong.trans_err_m.value == pytest.approx(exact.trans_err_m.value, abs=0.02)


def test_in_a_room_the_camera_of_a_blurred_picture_is_found_and_of_noise_none(room):
    """A blur of 3 pixels leaves no corner; the view of another room is not this one."""
    import cv2

    video, c2w, known = room(0)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in video[:3]])
    found = make_estimator("map").estimate(soft, FPS, known_part(known, 3)).c2w
    errors = camera_errors(c2w[:3], found, "none")
    assert errors.rot_err_deg.coverage == 1
    assert errors.rot_err_deg.value < 1
    assert errors.trans_err_m.value < 0.1
    grain = np.random.default_rng(0).integers(0, 256, video[:1].shape).astype(np.uint8)
    assert np.isnan(make_estimator("map").estimate(grain, FPS, known_part(known, 1)).c2w).all()


def known_part(known: KnownScene, frames: int) -> KnownScene:
    return KnownScene(known.key, known.intrinsics[:frames], known.first, known.frames)


def test_pictures_of_nothing_have_no_pose(clips):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    video, _, known = clips[0]
    grain = np.random.default_rng(0).integers(0, 256, video[:4].shape).astype(np.uint8)
    track = make_estimator("map").estimate(grain, FPS, KnownScene("x", known.intrinsics[:4],
                                           known.first, known.frames))  # fmt: skip
    assert np.isnan(track.c2w).all()
    assert "no frame was found" in track.reason
    bare = make_estimator("map").estimate(
        grain, FPS, KnownScene("x", known.intrinsics, known.first)
    )
    assert "recording=<folder>" in bare.reason


def test_a_cut_is_found_in_its_clip_and_another_path_is_refused(clips, gameplay):
    c2w = clips[1][1]
    part = (np.linalg.inv(c2w[8]) @ c2w[8:33]).astype(np.float32).astype(np.float64)
    assert place_of(c2w, part) == 8
    scenes = Recording(gameplay.parent / "recording")
    frames = scenes.scene(clips[1][2].key, part)
    # the map is in the cut's world: key frame 2 is frame 8, its first
    assert np.abs(frames.c2w[2] - np.eye(4)).max() < 1e-5
    assert scenes.scene("unknown", part) is None
    with pytest.raises(DataError, match="another path"):
        scenes.scene(clips[0][2].key, part)


def test_given_paths_are_read_from_npz_and_tum(tmp_path, clips):
    video, c2w, known = clips[0]
    np.savez(tmp_path / "a.npz", c2w=c2w[::2], frames=np.arange(0, len(c2w), 2), metric=True)
    lines = []
    for i, pose in enumerate(c2w):
        w = np.sqrt(max(0.0, 1 + np.trace(pose[:3, :3]))) / 2
        r = pose[:3, :3]
        x, y, z = (r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]) / (4 * w)
        lines.append(" ".join(map(repr, map(float, (i / FPS, *pose[:3, 3], x, y, z, w)))))
    (tmp_path / "b.txt").write_text("# a comment\n" + "\n".join(lines))
    given = make_estimator(f"given:{tmp_path}")
    track = given.estimate(video, FPS, KnownScene("a", known.intrinsics, known.first))
    assert track.metric
    assert np.array_equal(track.c2w[::2], c2w[::2])
    assert np.isnan(track.c2w[1::2]).all()
    tum = given.estimate(video, FPS, KnownScene("b", known.intrinsics, known.first))
    assert not tum.metric
    assert np.abs(tum.c2w - c2w).max() < 1e-9
    lost = given.estimate(video, FPS, KnownScene("c", known.intrinsics, known.first))
    assert "no file c.npz" in lost.reason
    np.savez(tmp_path / "d.npz", c2w=np.tile(np.eye(4), (99, 1, 1)))
    with pytest.raises(DataError, match="one for each frame from 0 to"):
        given.estimate(video, FPS, KnownScene("d", known.intrinsics, known.first))


def test_a_command_gets_the_video_and_its_poses_are_taken(tmp_path, clips):
    video, _, known = clips[0]
    program = tmp_path / "estimate.py"
    program.write_text(
        "import sys, av, numpy as np\n"
        "with av.open(sys.argv[1]) as film: n = sum(1 for _ in film.decode(video=0))\n"
        "c2w = np.tile(np.eye(4), (n, 1, 1)); c2w[:, 0, 3] = np.arange(n)\n"
        "np.savez(sys.argv[2], c2w=c2w)\n"
    )
    run = make_estimator(f"command:{sys.executable} {program} {{video}} {{out}}")
    track = run.estimate(video[:5], FPS, known)
    assert track.c2w[:, 0, 3].tolist() == [0, 1, 2, 3, 4]
    program.write_text("import sys; sys.exit('no weights here')")
    with pytest.raises(DataError, match=r"exit code 1 .*no weights here"):
        run.estimate(video[:5], FPS, known)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("maps", "expected one of given, map, colmap, command"),
        ("given:/nowhere", "expected a folder of paths"),
        ("command:program {video}", r"\{video\} and \{out\}"),
        ("map:x", "expected nothing behind map"),
    ],
)
def test_a_wrong_estimator_is_refused_at_once(text, match):
    with pytest.raises(DataError, match=match):
        make_estimator(text)
    assert estimator_names()[:4] == ("given", "map", "colmap", "command")


@pytest.mark.full
def test_structure_from_motion_finds_a_path_up_to_scale(clips):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    for video, c2w, known in clips:  # in the first two clips no third frame fits the first pair
        track = make_estimator("colmap").estimate(video, FPS, known)
        errors = camera_errors(c2w, track.c2w)
        assert not track.metric
        assert errors.rot_err_deg.coverage > 0.8
        assert np.nanmedian(errors.rotation) < 2
