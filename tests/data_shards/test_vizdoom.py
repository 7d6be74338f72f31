"""Recorded cameras against the recorded pictures: carried through depth and pose, pixels must land
on their like."""

import contextlib
import filecmp
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_shards import encode, record
from data_shards.sources.recording import RecordingSource
from data_shards.sources.vizdoom import (
    MAX_UNITS_PER_TIC,
    METRES_PER_UNIT,
    camera_intrinsics,
    camera_matrix,
    halve,
    nearest,
    tics_until,
)
from data_shards.sources.wander import Wanderer


def reproject(depth, source_k, source_c2w, target_k, target_c2w):
    """[H, W] metres -> (column, row, depth) [H, W] each: where frame A's pixels are in frame B."""
    height, width = depth.shape
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack(
        [
            (column - source_k[2]) / source_k[0],
            (row - source_k[3]) / source_k[1],
            np.ones_like(row),
        ],
        -1,
    )
    world = (rays * depth[..., None]) @ source_c2w[:3, :3].T + source_c2w[:3, 3]
    local = (world - target_c2w[:3, 3]) @ target_c2w[:3, :3]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = local[..., 0] / local[..., 2], local[..., 1] / local[..., 2]
    return x * target_k[0] + target_k[2], y * target_k[1] + target_k[3], local[..., 2]


ALIKE = 12.0  # levels, of the mean over colours


def found_share(video, depth, c2w, intrinsics, a, b):
    """Share of frame a's pixels in view of frame b, by pose and depth, that have their depth and
    their colour there; and the share that is in view."""
    column, row, z = reproject(depth[a], intrinsics[a], c2w[a], intrinsics[b], c2w[b])
    inside = (
        (z > 0.3) & (column >= 0) & (column < video.shape[2]) & (row >= 0) & (row < video.shape[1])
    )
    assert inside.any(), "a camera that sees nothing of frame a tests nothing"
    columns, rows = column[inside].astype(int), row[inside].astype(int)
    deep = np.abs(depth[b, rows, columns] - z[inside]) < 0.5  # not hidden behind something
    difference = np.abs(video[a][inside].astype(float) - video[b, rows, columns]).mean(axis=-1)
    return (deep & (difference < ALIKE)).mean(), inside.mean()


def test_pictures_are_means_and_depth_is_the_nearest_of_two_by_two():
    random = np.random.default_rng(0)
    image, depth = (
        random.integers(0, 256, (24, 32, 3), dtype=np.uint8),
        random.integers(0, 256, (24, 32), dtype=np.uint8),
    )
    mean = image.reshape(12, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    np.testing.assert_array_equal(halve(image), np.floor(mean + 0.5))
    np.testing.assert_array_equal(nearest(depth), depth.reshape(12, 2, 16, 2).min(axis=(1, 3)))


@pytest.fixture(scope="module")
def clip(recording):
    """The recorded clip that turns the most: the sharpest test of the camera."""
    source = RecordingSource(recording)
    turned = [np.abs(source.array(clip.key, "mouse")[:, 0].sum()) for clip in source.clips]
    key = source.clips[int(np.argmax(turned))].key
    facts = json.loads((recording / "recording.json").read_text())["depth_metres"]
    arrays = {name: source.array(key, name) for name in record.ARRAYS}
    return {**arrays, "depth": arrays["depth"] * facts["scale"] + facts["offset"]}


def test_pixels_reproject_onto_themselves(clip):
    a, b = 4, 10
    moved = np.linalg.norm(clip["c2w"][b, :3, 3] - clip["c2w"][a, :3, 3])
    assert (
        moved > 0.1 or abs(clip["mouse"][a + 1 : b + 1, 0].sum()) > 3
    )  # otherwise nothing is tested
    camera = (clip["video"], clip["depth"], clip["c2w"], clip["intrinsics"])
    right, visible = found_share(*camera, a, b)
    still = np.abs(clip["video"][a].astype(float) - clip["video"][b]).mean(axis=-1) < ALIKE
    assert visible > 0.5
    assert right > max(0.6, 2 * still.mean())
    # of each wrong camera fewer pixels are found: motion backwards, mirrored turn, square
    # focal lengths, principal point left alone
    backwards = clip["c2w"].copy()
    backwards[b, :3, 3] = 2 * clip["c2w"][a, :3, 3] - clip["c2w"][b, :3, 3]
    mirrored = clip["c2w"].copy()
    turn = clip["c2w"][a, :3, :3].T @ clip["c2w"][b, :3, :3]
    mirrored[b, :3, :3] = clip["c2w"][a, :3, :3] @ turn.T
    square = clip["intrinsics"].copy()
    square[:, 0] = square[:, 1]
    for c2w, intrinsics in (
        (backwards, clip["intrinsics"]),
        (mirrored, clip["intrinsics"]),
        (clip["c2w"], square),
    ):
        wrong, _ = found_share(clip["video"], clip["depth"], c2w, intrinsics, a, b)
        assert wrong < 0.75 * right


def test_depth_agrees_between_frames(clip):
    """Walls are known to half a step of the 8-bit depth (0.11 m), floors to one: the median must be
    below one step."""
    column, row, z = reproject(
        clip["depth"][4],
        clip["intrinsics"][4],
        clip["c2w"][4],
        clip["intrinsics"][12],
        clip["c2w"][12],
    )
    height, width = z.shape
    inside = (z > 0.3) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    there = clip["depth"][12, row[inside].astype(int), column[inside].astype(int)]
    assert np.median(np.abs(there - z[inside])) < 0.23


def test_camera_axes():
    facing_north = camera_matrix(32.0, 64.0, 41.0, 90.0)
    right, down, forward = facing_north[:3, :3].T
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(down, [0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(forward, [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(facing_north[:3, 3], [1.0, 2.0, 1.28125])
    np.testing.assert_allclose(camera_intrinsics(160, 120, 90.0, 0.0), [80, 96, 80, 60])
    assert camera_intrinsics(160, 120, 90.0, -5.0)[3] > 60  # looking up: the horizon sinks


def test_poses_are_rigid_and_smooth(clip):
    rotation = clip["c2w"][:, :3, :3]
    np.testing.assert_allclose(
        rotation @ rotation.transpose(0, 2, 1),
        np.broadcast_to(np.eye(3), rotation.shape),
        atol=1e-12,
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)
    steps = np.linalg.norm(np.diff(clip["c2w"][:, :3, 3], axis=0), axis=1)
    assert steps.max() < MAX_UNITS_PER_TIC * 3 * METRES_PER_UNIT


def test_mouse_motion_is_the_turn_of_the_camera(clip):
    """Right is positive and clockwise; the angle between two frames is what the mouse did between
    them."""
    forward = clip["c2w"][:, :3, 2]
    yaw = np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))
    np.testing.assert_allclose(-np.degrees(np.diff(yaw)), clip["mouse"][1:, 0], atol=0.05)
    pitch = np.degrees(np.arctan((60 - clip["intrinsics"][:, 3]) / clip["intrinsics"][:, 1]))
    np.testing.assert_allclose(np.diff(pitch), clip["mouse"][1:, 1], atol=0.05)
    assert not clip["mouse"][0].any()
    assert not clip["buttons"][0].any()


def test_controls_of_the_tics_add_up_to_those_of_the_frames(clip):
    """The camera says it too: it turns by the sum of all tics since the first frame."""
    frames = len(clip["video"])
    tics = [tics_until(i, 16.0) for i in range(frames)]
    assert clip["tic_buttons"].shape == (tics[-1], 4)
    assert clip["tic_mouse"].shape == (tics[-1], 2)
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(clip["tic_mouse"], axis=0)])[tics]
    np.testing.assert_allclose(np.diff(sums, axis=0), clip["mouse"][1:], atol=1e-4)
    forward = clip["c2w"][:, :3, 2]
    yaw = np.degrees(np.unwrap(np.arctan2(forward[:, 1], forward[:, 0])))
    grid = 360 / 65536  # of the angles of the engine, which rounds at every tic
    np.testing.assert_allclose(yaw[0] - yaw, sums[:, 0], atol=tics[-1] * grid)
    frame_of_tic = np.searchsorted(tics, np.arange(tics[-1]), side="right")
    np.testing.assert_array_equal(clip["tic_buttons"], clip["buttons"][frame_of_tic])


def test_the_mouse_moves_smoothly_within_a_frame():
    """Compare with the closed form: a tic makes a fifth of the way to the wished turn, and a
    twentieth of that to the wished pitch, in frames of any length."""
    player = Wanderer(np.random.default_rng(2), look_degrees=10.0)
    depth, intrinsics = np.full((120, 160), 9.0, np.float32), camera_intrinsics(160, 120, 90.0, 0.0)
    depth[:, :100] = 1.5  # something near, ahead and on the left
    tics = [3, 2, 4]
    for count in tics:
        _, moves = player.decide(depth, intrinsics, count)
        assert moves.shape == (count, 2)
        steps = np.diff(moves.astype(np.float64), axis=0)
        assert (np.abs(moves) > 1e-3).all()
        np.testing.assert_allclose(steps[1:, 0], 0.8 * steps[:-1, 0], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(moves[1:, 1], 0.95 * moves[:-1, 1], rtol=1e-3)


def test_a_limit_on_files_is_one_error_before_the_engine_starts(tmp_path):
    """The engine's library ended the process with SIGSEGV."""
    command = [sys.executable, "-m", "data_shards.record", "vizdoom", f"out={tmp_path / 'rec'}"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command, "clips=2", "frames=17"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "got a limit of 40,960 bytes on the size of a file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_mean_frame_rate_is_exact():
    assert [tics_until(i, 16.0) for i in (0, 1, 2, 16, 32, 160)] == [0, 2, 4, 35, 70, 350]
    assert {tics_until(i + 1, 16.0) - tics_until(i, 16.0) for i in range(160)} == {2, 3}
    assert tics_until(35, 35.0) == 35


def test_same_seed_same_bytes(recording, tmp_path):
    out = tmp_path / "again"
    assert record.main(["vizdoom", f"out={out}", "clips=2", "frames=17", "seed=3"]) == 0
    names = [str(file.relative_to(out)) for file in out.rglob("*.npy")]
    assert len(names) == 2 * len(record.ARRAYS)
    same, different, missing = filecmp.cmpfiles(recording, out, names, shallow=False)
    assert (sorted(same), different, missing) == (sorted(names), [], [])
    other = tmp_path / "other"
    assert record.main(["vizdoom", f"out={other}", "clips=1", "frames=17", "seed=4"]) == 0
    assert (
        json.loads((other / "recording.json").read_text())["clips"]
        != json.loads((out / "recording.json").read_text())["clips"][:1]
    )


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        (["vizdoom"], "out: missing"),
        (["vizdoom", "out=x", "frames=82"], "got 82, expected a multiple of 8 plus 1"),
        (["vizdoom", "out=x", "fps=nan"], "fps: got 'nan', expected a number from 1 to 35"),
        (["vizdoom", "out=x", "width=100"], "size: got 100x120"),
        (["vizdoom", "out=x", "speed=3", "clips=-1"], "speed: unknown key"),
        (["minecraft", "out=x"], "got 'minecraft', expected the source first"),
    ],
)
def test_bad_input_gets_one_report_and_code_2(arguments, report, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record.main(arguments) == 2
    assert report in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


KILLED_RUN = """
import os, signal, sys
from data_shards import encode, record
def deadly(folder, key, clip):
    write_clip(folder, key, clip)
    os.killpg(0, signal.SIGKILL)  # the game engine too, which would live on
write_clip, record.write_clip = record.write_clip, deadly
record.main({arguments!r})
"""


def test_a_killed_recording_is_made_again_and_leaves_nothing(tmp_path):
    arguments = ["vizdoom", f"out={tmp_path / 'rec'}", "clips=1", "frames=17", "seed=3"]
    script = KILLED_RUN.format(arguments=arguments)
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, timeout=60, start_new_session=True, check=False
    )
    (left,) = tmp_path.iterdir()
    assert (done.returncode, len(list(left.rglob("*.npy")))) == (-9, len(record.ARRAYS)), (
        done.stderr
    )
    elsewhere = {
        "rec.tmp-1",
        f"rec.tmp-another-machine-{2**22}",
        f"rec.tmp-{socket.gethostname()}-1",
    }  # 1 is running
    for name in elsewhere:
        (tmp_path / name).mkdir()
    assert record.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rec", *elsewhere}
    assert len(json.loads((tmp_path / "rec" / "recording.json").read_text())["clips"]) == 1


@pytest.mark.parametrize("command", ["record", "encode"])
def test_a_users_folder_is_refused_and_kept(command, recording, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.mp4").write_bytes(b"a user's video")
    main = {
        "record": lambda: record.main(
            ["vizdoom", f"out={tmp_path / 'videos'}", "clips=1", "frames=17"]
        ),
        "encode": lambda: encode.main([f"source={recording}", f"out={tmp_path / 'videos'}"]),
    }
    assert main[command]() == 2
    assert "videos, which exists and is no" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["videos", "mine.mp4"]


STOPPED_RUN = """
import os, signal, sys, time
from data_shards import record
from data_shards.sources import vizdoom
def stopping(folder, key, clip):
    made = write_clip(folder, key, clip)
    if len(os.listdir(folder)) == {after}:
        print("instance", game.get_instance_id(), flush=True)
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
    return made
def opened(*arguments):
    global game
    game = open_game(*arguments)
    return game
write_clip, record.write_clip = record.write_clip, stopping
open_game, vizdoom.open_game = vizdoom.open_game, opened
sys.exit(record.main({arguments!r}))
"""


def engines(folder):
    """Processes that were started in this folder and are alive, by their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if b"vizdoom" in words and str(folder).encode() in words:
                found.append(words)
    return found


@pytest.mark.drill
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_recording_that_is_stopped_leaves_no_engine_and_is_gone_on_with(
    recording, tmp_path, monkeypatch, name
):
    """Output through a pipe, which an engine that lives on would hold open."""
    scratch, home = tmp_path / "scratch", tmp_path / "home"
    scratch.mkdir()
    home.mkdir()
    out = home / "rec"
    arguments = ["vizdoom", f"out={out}", "clips=6", "frames=17", "seed=3"]
    script = STOPPED_RUN.format(arguments=arguments, name=name, after=4)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        timeout=60,
        cwd=home,
        env={**os.environ, "TMPDIR": str(scratch)},
        check=False,
    )
    number = getattr(signal, name)
    assert done.returncode == (-9 if name == "SIGKILL" else 128 + number), done.stderr
    assert name == "SIGKILL" or f"interrupted ({name})".encode() in done.stderr
    assert b"Traceback" not in done.stderr
    deadline = time.monotonic() + 30
    while engines(scratch) or list(scratch.iterdir()):
        assert time.monotonic() < deadline, "something outlived the recording"
        time.sleep(0.05)
    instance = done.stdout.decode().split("instance ")[1].split()[0]
    assert not list(Path("/dev/shm").glob(f"ViZDoom*{instance}"))
    (draft,) = home.iterdir()
    kept = {path: path.stat().st_mtime_ns for path in draft.rglob("video.npy")}
    assert len(kept) == 4
    assert record.main(arguments) == 0
    assert [path.name for path in home.iterdir()] == ["rec"]
    files = sorted(str(f.relative_to(recording)) for f in recording.rglob("*") if f.is_file())
    assert files == sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    assert filecmp.cmpfiles(recording, out, files, shallow=False)[1:] == ([], [])
    times = {path.stat().st_mtime_ns for path in out.rglob("video.npy")}
    assert len(times & set(kept.values())) >= 2, "complete episodes are not recorded again"


def test_recording_leaves_nothing_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert record.main(["vizdoom", "out=rec", "clips=1", "frames=9", "seed=3"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rec"]
    assert {path.name for path in (tmp_path / "rec").iterdir()} == {"clips", "recording.json"}
