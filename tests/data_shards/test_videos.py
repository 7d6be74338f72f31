"""A folder of videos with every kind of sidecar, made here with PyAV."""

import json
from fractions import Fraction

import numpy as np
import pytest

from data_shards import encode
from data_shards.beside.colmap import read_colmap
from data_shards.cameras import square_intrinsics, square_poses
from data_shards.controls import BUTTONS, KEY_DOWN, MOUSE
from data_shards.schema import DataError
from data_shards.sources import open_source
from data_shards.storage.read import open_dataset

FRAMES = 20  # 17 of them make a clip


def poses(frames=FRAMES):
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    angle = 0.05 * np.arange(frames)
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(angle)
    c2w[:, 0, 2], c2w[:, 2, 0] = np.sin(angle), -np.sin(angle)
    c2w[:, 2, 3] = 0.1 * np.arange(frames)
    return c2w


def write_colmap(folder, c2w):
    """A text model as COLMAP writes it, images in another order than their names; rotations about y
    only."""
    folder.mkdir()
    (folder / "cameras.txt").write_text("# cameras\n1 PINHOLE 32 32 20 21 16 17\n")
    w2c = np.linalg.inv(c2w)
    lines = ["# images"]
    for i in reversed(range(len(w2c))):
        half = np.arctan2(w2c[i, 0, 2], w2c[i, 0, 0]) / 2
        t = w2c[i, :3, 3]
        lines += [
            f"{i + 1} {np.cos(half)} 0 {np.sin(half)} 0 {t[0]} {t[1]} {t[2]} 1 frame_{i:04d}.png",
            "1.0 2.0 -1",
        ]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def of_frames(folder):
    """The camera of a model, of a video of FRAMES frames of 32x32."""
    return read_colmap(folder, FRAMES, (32, 32))


def test_videos_with_sidecars_become_a_data_set(write_video, tmp_path, capsys):
    folder, out = tmp_path / "videos", tmp_path / "set"
    folder.mkdir()
    c2w, controls = poses(), np.arange(2 * FRAMES, dtype=np.float32).reshape(FRAMES, 2)
    facts = {"control_names": ["gas", "mouse_dx"], "control_sums": [False, True]}
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4")
    pinhole = [20.0, 21.0, 16.0, 17.0]
    np.savez(
        folder / "a.npz",
        w2c=np.linalg.inv(c2w)[:, :3],
        intrinsics=pinhole,
        controls=controls,
        **facts,
        episode="tape1",
    )
    matrix = [[20.0, 0, 16.0], [0, 21.0, 17.0], [0, 0, 1]]
    (folder / "b.json").write_text(
        json.dumps(
            {"c2w": c2w.tolist(), "intrinsics": matrix, "controls": controls.tolist(), **facts}
        )
    )
    assert encode.main([f"source={folder}", f"out={out}", "validation=0.5"]) == 0
    assert "6 frames at the ends of clips are left out" in capsys.readouterr().out
    dataset = open_dataset(str(out))
    assert (dataset.info.fps, dataset.info.control_names, dataset.info.metres_per_unit) == (
        16.0,
        ("gas", "mouse_dx"),
        1.0,
    )
    for key, episode in (("a", "tape1"), ("b", "b")):
        clip = dataset.read(key)
        assert clip.entry.episode == episode
        np.testing.assert_allclose(clip.c2w, c2w[:17], atol=1e-12)
        np.testing.assert_array_equal(clip.intrinsics, np.tile([20.0, 21.0, 16.0, 17.0], (17, 1)))
        np.testing.assert_allclose(
            clip.fields["controls"][1], [controls[1:9, 0].mean(), controls[1:9, 1].sum()]
        )
        brightness = 127.5 * (
            clip.latents[0, 0] / (np.sqrt(3) * 16) + 1
        )  # the mean of frame 0, which is black
        np.testing.assert_allclose(brightness, 0, atol=3)


def test_colmap_poses_are_the_same_camera(tmp_path):
    write_colmap(tmp_path / "m", poses())
    c2w, intrinsics = of_frames(tmp_path / "m")
    np.testing.assert_allclose(c2w, poses(), atol=1e-9)
    np.testing.assert_array_equal(intrinsics[5], [20, 21, 16, 17])


POSES, PINHOLE = poses(), [20, 21, 16, 17]


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("npz", {"c2w": POSES}),
        ("npz", {"w2c": np.linalg.inv(POSES)}),
        ("npz", {"w2c": np.linalg.inv(POSES)[:, :3]}),
        ("json", {"c2w": POSES[:, :3].tolist()}),
        ("json", {"w2c": np.linalg.inv(POSES).tolist()}),
        ("colmap", {}),
    ],
)
def test_poses_of_every_kind_of_sidecar_are_the_same_camera(write_video, tmp_path, kind, facts):
    write_video(tmp_path / "a.mp4")
    if kind == "colmap":
        write_colmap(tmp_path / "a.colmap", POSES)
        (tmp_path / "a.json").write_text(json.dumps({"metres_per_unit": 2.0}))
    elif kind == "npz":
        np.savez(
            tmp_path / "a.npz",
            **facts,
            intrinsics=np.tile([20, 21, 16, 17], (FRAMES, 1)),
            metres_per_unit=2.0,
        )
    else:
        (tmp_path / "a.json").write_text(
            json.dumps({**facts, "intrinsics": [20, 21, 16, 17], "metres_per_unit": 2.0})
        )
    source = open_source(str(tmp_path))
    content = source.load(source.clips[0])
    np.testing.assert_allclose(content.c2w[:, :3, :3], POSES[:17, :3, :3], atol=1e-9)
    np.testing.assert_allclose(content.c2w[:, :3, 3], 2 * POSES[:17, :3, 3], atol=1e-9)  # in metres
    np.testing.assert_array_equal(content.intrinsics, np.tile([20, 21, 16, 17], (17, 1)))


def test_colmap_cameras(tmp_path):
    write_colmap(tmp_path / "m", POSES)
    (tmp_path / "m" / "cameras.txt").write_text("1 SIMPLE_PINHOLE 32 32 20 16 17\n")
    np.testing.assert_array_equal(of_frames(tmp_path / "m")[1][0], [20, 20, 16, 17])
    (tmp_path / "m" / "cameras.txt").write_text("1 OPENCV 32 32 20 21 16 17 0.1 0 0 0\n")
    with pytest.raises(DataError, match=r"got camera model OPENCV.*Fix: undistort first"):
        of_frames(tmp_path / "m")
    (tmp_path / "m" / "cameras.txt").write_text("2 PINHOLE 32 32 20 21 16 17\n")
    with pytest.raises(DataError, match=r"got camera '1', expected one of cameras\.txt"):
        of_frames(tmp_path / "m")


def test_events_are_bucketed_at_the_latent_rate(write_video, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "set"
    folder.mkdir()
    write_video(folder / "a.mp4", frames=17)
    columns = {
        "kind": [MOUSE, KEY_DOWN, MOUSE],
        "code": [0, 65, 0],
        "dx": [5, 0, 7],
        "dy": [1, 0, 0],
    }
    np.savez(
        folder / "a.events.npz",
        time_ns=np.array([100, 500, 800]) * 10**6,
        **{k: np.array(v, np.int32) for k, v in columns.items()},
    )
    assert encode.main([f"source={folder}", f"out={out}"]) == 0
    controls = open_dataset(str(out)).read("a").fields["controls"]
    assert controls.shape == (3, BUTTONS + 3)
    assert controls[:, BUTTONS].tolist() == [0, 5, 7]  # snapshots at 0, 500 and 1000 ms
    assert controls[:, 65].tolist() == [0, 1, 1]


def test_what_does_not_fit_is_refused(write_video, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4")
    source = open_source(str(folder))
    assert (source.fps, source.clips[0].frames) == (float(Fraction(16)), 17)
    for content, report in (
        ({"c2w": poses().tolist()}, "poses without intrinsics"),
        ({"c2w": (2 * poses()).tolist(), "intrinsics": PINHOLE}, "expected rigid"),
        (
            {"c2w": poses().tolist(), "w2c": poses().tolist(), "intrinsics": PINHOLE},
            "got c2w and w2c, expected one",
        ),
        (
            {"c2w": poses(5).tolist(), "intrinsics": PINHOLE},
            "poses for 5 frames, expected one for each of the video's 20",
        ),
        ({"controls": [[1.0]] * FRAMES, "control_names": ["a", "b"]}, r"got controls \(20, 1\)"),
    ):
        (folder / "a.json").write_text(json.dumps(content))
        source = open_source(str(folder))
        with pytest.raises(DataError, match=report):
            source.load(source.clips[0])
    (folder / "a.json").unlink()
    np.savez(folder / "a.npz", c2w=np.array([{"a": 1}], dtype=object))
    source = open_source(str(folder))
    with pytest.raises(DataError, match="without pickles"):
        source.check(source.clips[0])
    (folder / "a.npz").unlink()
    write_video(folder / "b.mp4", rate=30)
    assert encode.main([f"source={folder}", f"out={tmp_path / 'set'}"]) == 2
    assert "different frame rates" in capsys.readouterr().err
    (folder / "b.mp4").write_bytes(b"not a video")
    assert encode.main([f"source={folder}", f"out={tmp_path / 'set'}"]) == 2
    assert "cannot open b.mp4" in capsys.readouterr().err


def test_shapes_of_poses_and_intrinsics():
    np.testing.assert_array_equal(
        square_intrinsics(np.array([1.0, 2, 3, 4]), 3, ""), [[1, 2, 3, 4]] * 3
    )
    with pytest.raises(DataError, match="fx, fy > 0"):
        square_intrinsics(np.array([0.0, 2, 3, 4]), 3, "")
    mirrored = np.tile(np.diag([1.0, 1, -1, 1]), (2, 1, 1))
    with pytest.raises(DataError, match="mirrored"):
        square_poses(mirrored, False, "")
    with pytest.raises(DataError, match=r"\[F, 3, 4\]"):
        square_poses(np.eye(4), False, "")
