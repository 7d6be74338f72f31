"""Filtering: each metric on clips made to have a known value, the report, and that the loader obeys the selection."""

import json

import numpy as np
import pytest

from data_shards import filter as filter_command
from data_shards.filter import judge, load_scores, load_thresholds
from data_shards.metrics import camera_metrics, camera_words, hsv, video_metrics
from data_shards.read import open_dataset
from data_shards.schema import DataError


def straight_walk(frames, jump_at=None):
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = 0.1 * np.arange(frames)
    if jump_at is not None:
        c2w[jump_at:, 0, 3] += 3.0
    return c2w


def test_camera_metrics_of_known_cameras():
    intrinsics = np.tile([80.0, 96.0, 80.0, 60.0], (9, 1))
    metrics = camera_metrics(straight_walk(9), intrinsics, 160, 120)
    assert metrics["fov_x_degrees"] == pytest.approx(90.0)
    assert metrics["fov_y_degrees"] == pytest.approx(np.degrees(2 * np.arctan(60 / 96)))
    assert metrics["focal_divergence"] == pytest.approx(16 / 88)
    assert metrics["pose_jump_m"] == pytest.approx(0.0, abs=1e-12)
    assert camera_metrics(straight_walk(9, jump_at=4), intrinsics, 160, 120)["pose_jump_m"] == pytest.approx(3.0)
    intrinsics[5, 0] = 20.0  # one bad frame is enough
    assert camera_metrics(straight_walk(9), intrinsics, 160, 120)["fov_x_degrees"] > 150


def test_video_metrics_of_known_videos():
    grey = np.full((6, 16, 16, 3), 100, np.uint8)
    assert video_metrics(grey) == {"saturation": 0.0, "vmaf_motion": 0.0, "scene_cuts": 0.0}
    brighter = grey + np.arange(0, 30, 5, dtype=np.uint8)[:, None, None, None]
    assert video_metrics(brighter)["vmaf_motion"] == pytest.approx(5.0, abs=0.01)  # blurring a flat frame changes nothing
    cut = grey.copy()
    cut[3:] = (250, 10, 10)
    assert video_metrics(cut)["scene_cuts"] == 1.0
    assert video_metrics(cut)["saturation"] == pytest.approx(255 * 0.96 / 2, rel=0.01)


def test_hsv_is_the_standard_librarys():
    import colorsys

    random = np.random.default_rng(0).integers(0, 256, (1, 200, 3), dtype=np.uint8)
    expected = [[h * 180, s * 255, v * 255] for h, s, v in (colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in random[0])]
    np.testing.assert_allclose(hsv(random)[0], expected, atol=0.05)


def test_ranges_are_inclusive_and_nan_is_outside():
    ranges = {"dover": (0.35, 1.0)}
    assert judge({"dover": 0.35}, ranges) == []
    assert judge({"dover": float("nan")}, ranges) == ["dover nan is not in [0.35, 1]"]
    assert judge({"dover": 0.2}, ranges) == ["dover 0.2 is not in [0.35, 1]"]


def test_papers_table():
    ranges = load_thresholds(None, "dl3dv_gs")
    assert ranges["vmaf_motion"] == (6.0, 50.0)
    assert ranges["scale_cv"] == (0.0, 2.0)
    assert ranges["focal_divergence"] == (0.0, 0.2)
    assert ranges["fov_x_degrees"] == (25.0, 120.0)


@pytest.mark.parametrize(
    ("content", "report"),
    [
        ("camera: {}\ntables: {a: {x: [2, 1]}}", r"got x: \[2, 1\]"),
        ("camera: {}\ntables: {a: {x: 3}}", "got x: 3"),
        ("camera: {}\ntables: {a: {x: [0, .nan]}}", "got x"),
        ("camera: {}\ntables: {b: {}}", "got no 'a'"),
        ("[", "expected YAML"),
        ("!!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_bad_thresholds_are_refused(tmp_path, content, report):
    file = tmp_path / "t.yaml"
    file.write_text(content)
    with pytest.raises(DataError, match=report):
        load_thresholds(str(file), "a")


def test_selection_is_reported_and_obeyed(dataset_path, tmp_path, capsys):
    dataset, out, cache = open_dataset(str(dataset_path)), tmp_path / "selection.json", tmp_path / "cache.json"
    keys = [entry.key for split in ("train", "validation") for entry in dataset.clips(split)]
    scores = tmp_path / "scores.csv"
    scores.write_text("key,dover\n" + "\n".join(f"{key},{0.9 if i % 2 else 0.1}" for i, key in enumerate(keys)))
    thresholds = tmp_path / "t.yaml"
    thresholds.write_text("camera: {fov_x_degrees: [25, 120]}\ntables: {mine: {dover: [0.5, 1]}}")
    arguments = [f"path={dataset_path}", f"out={out}", f"thresholds={thresholds}", "table=mine", f"scores_cache={cache}"]
    assert filter_command.main(arguments) == 2
    assert f"got none for dover ({len(keys)} clips)" in capsys.readouterr().err
    assert filter_command.main([*arguments, f"scores={scores}"]) == 0
    assert f"{(len(keys) + 1) // 2} clips outside dover" in capsys.readouterr().out
    selection = json.loads(out.read_text())
    assert set(selection["dropped"]) == set(keys[0::2])
    chosen = open_dataset(str(dataset_path), selection=str(out))
    assert [entry.key for split in ("train", "validation") for entry in chosen.clips(split)] == keys[1::2]
    assert chosen.fingerprint != dataset.fingerprint
    out.write_text(json.dumps({**selection, "dataset_fingerprint": "other"}))
    with pytest.raises(DataError, match="made for another data set"):
        open_dataset(str(dataset_path), selection=str(out))


def test_gameplay_passes_the_game_table(dataset_path, tmp_path):
    out = tmp_path / "selection.json"
    assert filter_command.main([f"path={dataset_path}", f"out={out}", "table=game"]) == 0
    assert json.loads(out.read_text())["dropped"] == {}


def test_captions_that_name_camera_motion_are_flagged(dataset_path, tmp_path, capsys):
    moving = [
        "The camera slowly pans across the room.",
        "a hallway, moving forward",
        "we turn to the left",
        "Zoom in on the door",
        "pan left",
    ]
    still = ["A frying pan lies on the left shelf.", "A person walks a dog.", "Trucks are parked.", "A corridor with a red door."]
    assert [bool(camera_words(caption)) for caption in moving + still] == [True] * 5 + [False] * 4
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"a": "A red room.", "b": "The camera moves forward."}))
    arguments = [f"path={dataset_path}", f"out={tmp_path / 's.json'}", "table=none", f"captions={captions}"]
    assert filter_command.main(arguments) == 1
    assert "caption of b names camera motion" in capsys.readouterr().out


def test_bad_scores_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("name,dover\nx,1\n")
    with pytest.raises(DataError, match="expected a CSV with a column"):
        load_scores(str(tmp_path / "a.csv"))
