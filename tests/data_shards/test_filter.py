"""Filtering: each metric on clips made to have a known value, the report, and that the loader obeys
the selection."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import filter as filter_command
from data_shards.filter import judge, load_scores, load_thresholds
from data_shards.metrics import (
    camera_metrics,
    camera_words,
    motion_by_ffmpeg,
    motion_by_formula,
    saturation,
    scene_cuts,
    video_metrics,
    vmaf_motion,
)
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset


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
    assert camera_metrics(straight_walk(9, jump_at=4), intrinsics, 160, 120)[
        "pose_jump_m"
    ] == pytest.approx(3.0)
    intrinsics[5, 0] = 20.0  # one bad frame is enough
    assert camera_metrics(straight_walk(9), intrinsics, 160, 120)["fov_x_degrees"] > 150


def test_video_metrics_of_known_videos():
    grey = np.full((40, 32, 32, 3), 100, np.uint8)
    assert video_metrics(grey, 16) == {
        "saturation": 0.0,
        "vmaf_motion": 0.0,
        "flow_pixels": 0.0,
        "scene_cuts": 0.0,
    }
    brighter = grey[:6] + np.arange(0, 30, 5, dtype=np.uint8)[:, None, None, None]
    assert vmaf_motion(brighter)[1:] == pytest.approx(
        [5 * 219 / 255] * 5, abs=0.75
    )  # luma in video range, in whole numbers
    assert video_metrics(brighter, 16, ["vmaf_motion"])["vmaf_motion"] == pytest.approx(
        5 * 219 / 255, abs=0.1
    )
    cut = grey.copy()
    cut[20:] = (250, 10, 10)
    assert scene_cuts(cut, 16) == [20]
    found = video_metrics(cut, 16, ["scene_cuts", "saturation"])
    assert found == {"scene_cuts": 1.0, "saturation": pytest.approx(255 * 0.96 / 2, rel=0.01)}


def test_motion_is_ffmpegs():
    """The formula, which is used where PyAV is not installed, against FFmpeg's filter."""
    planes = np.random.default_rng(0).integers(16, 236, (4, 96, 128), dtype=np.uint8)
    ours, ffmpegs = motion_by_formula(planes), motion_by_ffmpeg(planes)
    assert ours == pytest.approx(ffmpegs, rel=0.01)
    assert ours[1] > 10


def test_flow_of_a_picture_that_moves():
    y, x = np.mgrid[0:112, 0:200] / 8.0
    picture = np.sin(x + np.sin(y)) + np.sin(1.7 * y + 0.6 * x) + np.sin(0.31 * x * y)
    grey = (
        ((picture / 6 + 0.5) * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    )  # [112, 200, 3]
    video = np.stack(
        [grey[:, i : i + 160] for i in range(17)]
    )  # a pixel a frame, 8 in half a second
    assert video_metrics(video, 16, ["flow_pixels"])["flow_pixels"] == pytest.approx(8, rel=0.15)
    assert video_metrics(video[:1], 16, ["flow_pixels"])["flow_pixels"] == 0.0


def test_saturation_is_the_standard_librarys():
    import colorsys

    random = np.random.default_rng(0).integers(0, 256, (1, 200, 3), dtype=np.uint8)
    expected = [colorsys.rgb_to_hsv(*(pixel / 255))[1] * 255 for pixel in random[0]]
    np.testing.assert_allclose(saturation(random[0]), expected, atol=0.05)
    assert saturation(np.zeros((1, 3), np.uint8)) == [0]


def test_a_tool_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(DataError, match=r"scenedetect is not installed.*wm-train\[filter\]"):
        video_metrics(np.zeros((2, 16, 16, 3), np.uint8), 16, ["scene_cuts"])


def test_ranges_are_inclusive_and_nan_is_outside():
    ranges = {"dover": (0.35, 1.0)}
    assert judge({"dover": 0.35}, ranges) == []
    assert judge({"dover": float("nan")}, ranges) == ["dover nan is not in [0.35, 1]"]
    assert judge({"dover": 0.2}, ranges) == ["dover 0.2 is not in [0.35, 1]"]


# Tab. 6 of the paper, row by row: VMAF motion, UniMatch, DOVER, colour saturation, scene cuts, VLM
# entity, VLM quality
PAPER = {
    "omniworld": [(0.5, 100), (3, 100), (0.35, 1.0), None, None, (0, 10), (0.5, 1.5)],
    "sekai_game": [(0.5, 50), (3, 80), (0.25, 1.0), None, None, (0, 10), (0.5, 1.5)],
    "sekai_walking": [(0.5, 50), (3, 50), (0.35, 1.0), (0, 180), None, (0, 25), (0.5, 1.5)],
    "miradata": [(0.5, 50), (3, 80), (0.4, 1.0), (0, 180), (0, 1), None, None],
    "dl3dv_gs": [(6, 50), (3, 80), (0.4, 1.0), (0, 180), (0, 1), None, None],
    "spatialvid": [(0.5, 50), (3, 80), (0.35, 1.0), (0, 180), None, (0, 10), (0.5, 1.5)],
}
COLUMNS = (
    "vmaf_motion",
    "unimatch",
    "dover",
    "saturation",
    "scene_cuts",
    "vlm_entity",
    "vlm_quality",
)


@pytest.mark.parametrize("name", PAPER)
def test_papers_table(name):
    ranges = {
        "fov_x_degrees": (25, 120),
        "fov_y_degrees": (25, 120),
        "focal_divergence": (0, 0.2),
        "scale_cv": (0, 2.0),
    }
    ranges |= {column: bounds for column, bounds in zip(COLUMNS, PAPER[name]) if bounds}
    assert load_thresholds(None, name) == ranges


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
    dataset, out, cache = (
        open_dataset(str(dataset_path)),
        tmp_path / "selection.json",
        tmp_path / "cache.json",
    )
    keys = [entry.key for split in ("train", "validation") for entry in dataset.clips(split)]
    scores = tmp_path / "scores.csv"
    scores.write_text(
        "key,dover\n" + "\n".join(f"{key},{0.9 if i % 2 else 0.1}" for i, key in enumerate(keys))
    )
    thresholds = tmp_path / "t.yaml"
    thresholds.write_text("camera: {fov_x_degrees: [25, 120]}\ntables: {mine: {dover: [0.5, 1]}}")
    arguments = [
        f"path={dataset_path}",
        f"out={out}",
        f"thresholds={thresholds}",
        "table=mine",
        f"scores_cache={cache}",
    ]
    assert filter_command.main(arguments) == 2
    assert f"got none for dover ({len(keys)} clips)" in capsys.readouterr().err
    assert filter_command.main([*arguments, f"scores={scores}"]) == 0
    assert f"{(len(keys) + 1) // 2} clips outside dover" in capsys.readouterr().out
    selection = json.loads(out.read_text())
    assert set(selection["dropped"]) == set(keys[0::2])
    chosen = open_dataset(str(dataset_path), selection=str(out))
    assert [
        entry.key for split in ("train", "validation") for entry in chosen.clips(split)
    ] == keys[1::2]
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
    still = [
        "A frying pan lies on the left shelf.",
        "A person walks a dog.",
        "Trucks are parked.",
        "A corridor with a red door.",
    ]
    assert [bool(camera_words(caption)) for caption in moving + still] == [True] * 5 + [False] * 4
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"a": "A red room.", "b": "The camera moves forward."}))
    arguments = [
        f"path={dataset_path}",
        f"out={tmp_path / 's.json'}",
        "table=none",
        f"captions={captions}",
    ]
    assert filter_command.main(arguments) == 1
    assert "caption of b names camera motion" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["captions_that_name_camera_motion"] == {
        "b": ["camera moves"]
    }
    assert filter_command.main([*arguments[:-1], "captions=shards"]) == 0  # these clips have none


def test_scores_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"x": {"dover": [0.2, 0.6], "scales": [1.0, 1.0, 4.0]}, "y": {"dover": None}})
    )
    (tmp_path / "b.csv").write_text("key,unimatch\nx,7\ny,\n")
    pq.write_table(pa.table({"key": ["x"], "vlm_entity": [3]}), tmp_path / "c.parquet")
    scores = load_scores(str(tmp_path / "a.json"))
    assert scores == {
        "x": {"dover": pytest.approx(0.4), "scale_cv": pytest.approx(2**0.5 / 2, rel=1e-5)},
        "y": {},
    }
    assert load_scores(str(tmp_path / "b.csv")) == {"x": {"unimatch": 7.0}, "y": {}}
    assert load_scores(str(tmp_path / "c.parquet")) == {"x": {"vlm_entity": 3.0}}


def test_bad_scores_are_refused(tmp_path):
    for name, content, report in (
        ("a.csv", "name,dover\nx,1\n", "expected a column `key`"),
        ("b.csv", "key,dover\nx,1\nx,2\n", "got key 'x' twice"),
        ("c.csv", "key,dover\nx,good\n", r"got 'good', expected a number.*key x, dover"),
        ("d.json", '{"x": 3}', "got 3, expected an object"),
        ("e.parquet", "no", "cannot use"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=report):
            load_scores(str(tmp_path / name))
    with pytest.raises(DataError, match="cannot use"):
        load_scores(str(tmp_path / "absent.csv"))
