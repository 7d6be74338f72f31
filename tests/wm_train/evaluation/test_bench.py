"""Check that SANA-WM-Bench's files are read, and that what is written has what the released
aggregator reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_shards.schema import DataError
from wm_train.evaluate import OPTIONS
from wm_train.evaluation.bench import evaluate_bench, read_scenes
from wm_train.evaluation.metrics.cameras import camera_errors
from wm_train.evaluation.pictures import write_video

F, KEYS = 33, ("indoor_001", "street_002")


def path(seed: int) -> np.ndarray:
    """Return a walk there and back the same way, [F, 4, 4]."""
    there = np.random.default_rng(seed).normal(size=(F // 2 + 1, 3)).cumsum(axis=0)
    c2w = np.tile(np.eye(4), (F, 1, 1))
    c2w[:, :3, 3] = np.concatenate([there, there[-2::-1]])
    return c2w


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A benchmark of two scenes."""
    folder = tmp_path / "bench" / "simple_60s" / "sanawm_export_v2"
    folder.mkdir(parents=True)
    lines, scenes = [], []
    lens = np.tile(np.array([[900.0, 0, 640], [0, 900, 360], [0, 0, 1]]), (F, 1, 1))
    for seed, key in enumerate(KEYS):
        np.savez(folder / f"{key}.npz", c2w=path(seed), intrinsics=lens, fps=16, num_frames=F)
        place = f"simple_60s/sanawm_export_v2/{key}.npz"
        entry = {"id": key, "prompt": "p", "image_path": "i", "camera_path": place}
        lines.append(json.dumps({**entry, "scene_type": key.split("_")[0]}))
        pairs = [
            {"frame_a": i, "frame_b": F - 1 - i, "quality_score": 1.0, "distance_m": 0.1 * i,
             "angle_diff_deg": 0.0} for i in reversed(range(7))
        ]  # fmt: skip
        scenes.append({"scene_id": key, "evaluation_pairs": pairs})
    (folder / "run_manifest.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "scene_trajectories_v2.json").write_text(json.dumps({"scenes": scenes}))
    return tmp_path / "bench"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Videos of a method, at 24 frames per second, and estimated paths of one of them."""
    folder = tmp_path / "results" / "ours" / "simple_60s"
    folder.mkdir(parents=True)
    frames = round((F - 1) * 24 / 16) + 1
    for key in KEYS:
        video = np.zeros((frames, 36, 64, 3), np.uint8)
        video += np.linspace(40, 200, frames).astype(np.uint8)[:, None, None, None]
        write_video(folder / f"{key}_generated.mp4", video, 24)
    (tmp_path / "poses").mkdir()
    wrong = path(0)[::4]
    wrong[1:, 0, 3] += 0.5
    np.savez(tmp_path / "poses" / f"{KEYS[0]}.npz", c2w=wrong)
    return folder


def options(tmp_path: Path, **changes) -> dict:
    given = {name: option.default for name, option in OPTIONS.items()}
    return {**given, "poses": f"given:{tmp_path / 'poses'}", **changes}


def test_the_benchmarks_files_are_read_and_the_five_closest_pairs_taken(bench):
    scenes = read_scenes(bench, "simple_60s")
    assert list(scenes) == list(KEYS)
    scene = scenes[KEYS[0]]
    assert np.array_equal(scene.c2w, path(0))
    assert scene.intrinsics[0].tolist() == [900, 900, 640, 360]
    assert [pair.frame_a for pair in scene.pairs] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="run_manifest"):
        read_scenes(bench, "hard_60s")


def test_results_have_what_the_released_aggregator_reads(bench, made, tmp_path):
    page = evaluate_bench(bench, made, options(tmp_path))
    poses = json.loads((made / "eval_poses.json").read_text())
    assert list(poses) == [KEYS[0]]  # the other has no path: it is left out, and is not 0
    entry = poses[KEYS[0]]
    wrong = path(0)[::4]
    wrong[1:, 0, 3] += 0.5
    expected = camera_errors(path(0)[::4], wrong)
    assert entry["TransErr_rel"] == pytest.approx(expected.trans_err_m.value)
    assert (entry["RotErr_unit"], entry["n_frames"], entry["scene_type"]) == ("deg", 9, "indoor")
    out = made.parent / "eval" / "simple_60s"
    revisit = json.loads((out / "revisit_consistency.json").read_text())
    assert revisit["summary"]["n_total_pairs"] == 10
    assert revisit["summary"]["per_category"]["street"]["n_scenes"] == 1
    # a ramp of grey: frames 0 and 48 (of 24 a second) differ by 160 levels
    first = revisit["per_scene"][KEYS[0]]["pairs"][0]
    assert first["psnr"] == pytest.approx(20 * np.log10(255 / 160), abs=0.2)
    assert json.loads((out / "summary.json").read_text())["revisit"] == revisit["summary"]
    assert json.loads((out / "vbench_scores.json").read_text())["quality_score"] is None
    assert not (out / "temporal_degradation.json").exists()  # nobody scored picture quality
    assert "2 of 2 scenes" in page
    assert "| 1 of 2 | 50% |" in page
    assert "- drift ↓: musiq needs pyiqa" in page


def test_a_refined_video_does_not_count_its_given_frame(bench, made, tmp_path):
    (made.parent / "method_info.json").write_text(json.dumps({"refiner": "ours"}))
    np.savez(tmp_path / "poses" / f"{KEYS[0]}.npz", c2w=path(0)[4::4])
    evaluate_bench(bench, made, options(tmp_path))
    entry = json.loads((made / "eval_poses.json").read_text())[KEYS[0]]
    assert (entry["n_frames"], entry["skip_first_frame"]) == (8, True)
    assert entry["TransErr_rel"] == pytest.approx(0, abs=1e-9)


def test_strict_and_wrong_folders_are_refused(bench, made, tmp_path):
    with pytest.raises(DataError, match="strict=true"):
        evaluate_bench(bench, made, options(tmp_path, strict="true"))
    empty = tmp_path / "none" / "simple_60s"
    empty.mkdir(parents=True)
    with pytest.raises(DataError, match="expected some"):
        evaluate_bench(bench, empty, options(tmp_path))
