"""Judge videos made for SANA-WM-Bench, and write the files that its released aggregator reads.

In: `<bench>/<split>/sanawm_export_v2/` with run_manifest.jsonl and `<id>.npz` (c2w [F, 4, 4],
intrinsics [F, 3, 3] in pixels of the given image, 16 frames per second), and
scene_trajectories_v2.json with the pairs of frames that show one view. Videos:
`<results>/<method>/<split>/<id>_generated.mp4`. Out: `<split>/eval_poses.json` beside the videos
and `<method>/eval/<split>/*.json`. The benchmark has no true videos, so there is no ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.cameras import square_intrinsics
from data_shards.schema import DataError
from wm_train.evaluation.metrics import pictures
from wm_train.evaluation.metrics.cameras import camera_errors
from wm_train.evaluation.metrics.lasting import WINDOW_S, drift, windows
from wm_train.evaluation.metrics.revisit import (
    MOST,
    NEAR_DEGREES,
    NEAR_M,
    REFERENCE_FPS,
    RevisitPair,
    remapped,
    revisit,
)
from wm_train.evaluation.metrics.score import Score, summarise, unknown
from wm_train.evaluation.poses import KnownScene, PoseEstimator, make_estimator
from wm_train.evaluation.results import number, with_error, write_json
from wm_train.evaluation.scorers import FRAME_SCORERS, PAIR_SCORERS, make_scorer

EVERY = 4  # frames between those whose pose counts: 241 of 961
# the folders of splits under their other names
OTHER_NAMES = {"simple_60s": "benchmark_v2_smooth_60s", "hard_60s": "benchmark_v2_hard_60s"}
EXPORT, PAIRS = "sanawm_export_v2", "scene_trajectories_v2.json"


@dataclass(frozen=True)
class Scene:
    """Hold a scene of the benchmark: the path [F, 4, 4] and intrinsics [F, 4] at 16 frames per
    second, and its pairs, the closest first."""

    key: str
    kind: str
    c2w: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    pairs: tuple[RevisitPair, ...]


def evaluate_bench(bench: Path, videos: Path, given: Mapping[str, Any]) -> str:
    """Judge all videos of a split; return the report, which also lies beside the results. Raises
    DataError for folders that are not a benchmark and its videos."""
    split, method = videos.resolve().name, videos.resolve().parent
    scenes = read_scenes(bench, split)
    files = {
        file.name.removesuffix("_generated.mp4"): file for file in sorted(videos.glob("*.mp4"))
    }
    known = [key for key in sorted(files) if key in scenes]
    if not known:
        raise DataError(
            f"videos: got no <id>_generated.mp4 of the {len(scenes)} scenes in {videos}, expected"
            " some. Fix: videos=<results>/<method>/<split>"
        )
    info = method / "method_info.json"
    refined = info.exists() and bool(json.loads(info.read_text()).get("refiner"))
    estimator = make_estimator(given["poses"]) if "cameras" in given["metrics"] else None
    scorers = {
        name: make_scorer(registry, name, given["strict"] == "true")
        for registry, name in ((FRAME_SCORERS, given["quality"]), (PAIR_SCORERS, "lpips"))
    }
    rows = [judge_scene(scenes[key], files[key], estimator, refined, scorers, given["quality"])
            for key in known]  # fmt: skip
    out = method / "eval" / split
    out.mkdir(parents=True, exist_ok=True)
    write_json(videos / "eval_poses.json", pose_file(rows, refined))
    write_json(out / "revisit_consistency.json", revisit_file(rows))
    write_json(out / "vbench_scores.json", vbench_file(rows))
    write_json(
        out / "summary.json", {"n_scenes": len(rows), "revisit": revisit_file(rows)["summary"]}
    )
    if any(row["windows"] for row in rows):
        write_json(out / "temporal_degradation.json", drift_file(rows))
    page = report(rows, len(scenes), method.name, split)
    (out / "report.md").write_text(page, encoding="utf-8")
    return page


def read_scenes(bench: Path, split: str) -> dict[str, Scene]:
    """Read all scenes of a split. Raises DataError for a folder that is no benchmark."""
    names = [name for name in (split, OTHER_NAMES.get(split)) if name and (bench / name).is_dir()]
    if not names:
        raise DataError(
            f"bench: got {bench}, expected a folder with {split}/{EXPORT}/run_manifest.jsonl. Fix:"
            " bench=<SANA-WM-Bench>"
        )
    folder = bench / names[0] / EXPORT
    try:
        lines = (folder / "run_manifest.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        file = next(f for f in (folder / PAIRS, folder.parent / PAIRS, bench / PAIRS) if f.exists())
        listed = {
            scene["scene_id"]: scene["evaluation_pairs"]
            for scene in json.loads(file.read_text(encoding="utf-8"))["scenes"]
        }
        return {
            entry["id"]: read_scene(entry, bench, listed.get(entry["id"], [])) for entry in entries
        }
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise DataError(
            f"bench: got {folder} ({error!r}), expected SANA-WM-Bench's files"
        ) from error


def read_scene(entry: Mapping[str, Any], bench: Path, pairs: Sequence[Mapping[str, Any]]) -> Scene:
    """Read the path of one scene; its pairs are sorted by distance and angle, the closest first."""
    place = Path(entry["camera_path"])
    with np.load(place if place.is_absolute() else bench / place, allow_pickle=False) as held:
        c2w = np.asarray(held["c2w"], np.float64)
        lenses = square_intrinsics(
            np.asarray(held["intrinsics"], np.float64), len(c2w), entry["id"]
        )
    found = [
        RevisitPair(
            int(pair["frame_a"]),
            int(pair["frame_b"]),
            float(pair["quality_score"]),
            float(pair["distance_m"]),
            float(pair["angle_diff_deg"]),
        )
        for pair in pairs
    ]
    found.sort(key=lambda pair: pair.distance_m / NEAR_M + pair.angle_deg / NEAR_DEGREES)
    kind = str(entry.get("scene_type", "unknown"))
    return Scene(entry["id"], kind, c2w, lenses, tuple(found[:MOST]))


def read_video(file: Path) -> tuple[NDArray[np.uint8], float]:
    """Return a video's frames [F, H, W, 3] and their rate. Raises DataError if it has none."""
    import av

    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"videos: got {file} ({error}), expected a video") from error
    if not frames or not rate:
        raise DataError(f"videos: got {len(frames)} frames of {rate:g} a second in {file}")
    return np.stack(frames), rate


def judge_scene(
    scene: Scene,
    file: Path,
    estimator: PoseEstimator | None,
    refined: bool,
    scorers: Mapping[str, tuple[Any | None, str]],
    quality: str,
) -> dict[str, Any]:
    """Return all scores of one video. refined: frame 0 is the given image, and does not count."""
    video, fps = read_video(file)
    frozen = np.repeat(video[:1], len(video), axis=0)
    pairs = [pair for pair in scene.pairs if pair.frame_b < len(scene.c2w)]
    row: dict[str, Any] = {"key": scene.key, "kind": scene.kind, "pairs": [], "windows": []}
    for name, compare in (("psnr", pictures.psnr), ("ssim", pictures.ssim)):
        score, each = revisit(video, fps, pairs, compare)
        row[name], row[name + "_floor"] = score, revisit(frozen, fps, pairs, compare)[0]
        row["pairs"].append(each)
    row["pairs"] = [
        {**asdict(pair), "psnr": a, "ssim": b}
        for pair, a, b in zip(pairs, *row["pairs"], strict=True)
    ]
    row["flickering"] = pictures.temporal_flickering(video)
    row |= judge_path(scene, video, fps, estimator, refined)
    scorer, reason = scorers[quality]
    row["drift"] = unknown(reason)
    if scorer is not None:
        values = scorer.score(video)
        row["drift"], row["windows"] = drift(values, fps), windows(values, fps)
    return row


def judge_path(
    scene: Scene,
    video: NDArray[np.uint8],
    fps: float,
    estimator: PoseEstimator | None,
    refined: bool,
) -> dict[str, Any]:
    """Return the camera errors of every fourth frame at 16 a second, aligned both ways."""
    if estimator is None:
        return {"cameras": {}, "cameras_floor": {}, "pose_frames": 0}
    numbers = range(0, len(scene.c2w), EVERY)
    last = round((len(video) - 1) * REFERENCE_FPS / fps)
    numbers = [i for i in numbers if i <= last][1 if refined else 0 :]
    own = video[[remapped(i, fps, len(video)) for i in numbers]]
    truth = scene.c2w[numbers]
    height, width = video.shape[1:3]
    # of the given image, whose principal point is near its middle
    lenses = scene.intrinsics[numbers]
    lenses = lenses * (width / (2 * lenses[:, 2:3]))
    if abs(lenses[0, 3] - height / 2) > 0.05 * height:
        raise DataError(
            f"videos: got {width}x{height} pixels of scene {scene.key}, expected the shape of the"
            " benchmark's images (1280x720)"
        )
    track = estimator.estimate(own, REFERENCE_FPS / EVERY, KnownScene(scene.key, lenses, truth[0]))
    still = np.repeat(truth[:1], len(truth), axis=0)
    found: dict[str, Any] = {"cameras": {}, "cameras_floor": {}, "pose_frames": len(numbers)}
    for alignment in ("rotations", "umeyama"):
        errors = camera_errors(truth, track.c2w, alignment)
        floor = camera_errors(truth, still, "rotations")
        for name in ("rot_err_deg", "trans_err_m", "cam_mc"):
            score = unknown(track.reason) if track.reason else getattr(errors, name)
            found["cameras"][f"{name}_{alignment}"] = score
            found["cameras_floor"][f"{name}_{alignment}"] = getattr(floor, name)
    return found


def pose_file(rows: Sequence[Mapping[str, Any]], refined: bool) -> dict[str, Any]:
    """Return eval_poses.json; a scene without a number is left out, as the aggregator takes none
    for 0."""
    names = {"RotErr": "rot_err_deg", "TransErr_rel": "trans_err_m", "CamMC_rel": "cam_mc"}
    found = {}
    for row in rows:
        scores = {key: row["cameras"].get(f"{name}_rotations") for key, name in names.items()}
        if all(score is not None and score.value is not None for score in scores.values()):
            found[row["key"]] = {
                **{key: score.value for key, score in scores.items() if score is not None},
                "RotErr_unit": "deg",
                "scene_type": row["kind"],
                "n_frames": row["pose_frames"],
                "skip_first_frame": refined,
            }
    return found


def revisit_file(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return revisit_consistency.json: means over all pairs, not over scenes."""

    def means(some: Sequence[Mapping[str, Any]], head: str) -> dict[str, Any]:
        pairs = [pair for row in some for pair in row["pairs"]]
        return {
            f"{head}psnr": float(np.mean([pair["psnr"] for pair in pairs])) if pairs else None,
            f"{head}ssim": float(np.mean([pair["ssim"] for pair in pairs])) if pairs else None,
            f"{head}lpips": None,
        }

    kinds = {
        kind: [row for row in rows if row["kind"] == kind] for kind in {r["kind"] for r in rows}
    }
    return {
        "summary": {
            **means(rows, "overall_mean_"),
            "n_total_pairs": sum(len(row["pairs"]) for row in rows),
            "n_lpips_pairs": 0,
            "per_category": {
                kind: {**means(some, "mean_"), "n_scenes": len(some)}
                for kind, some in kinds.items()
            },
        },
        "per_scene": {
            row["key"]: {
                **means([row], "mean_"),
                "n_pairs": len(row["pairs"]),
                "pairs": row["pairs"],
            }
            for row in rows
        },
    }


def vbench_file(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return vbench_scores.json, with the one dimension that needs no weights."""
    return {
        "temporal_flickering": float(np.mean([row["flickering"] for row in rows])),
        **dict.fromkeys(("total_score", "quality_score", "semantic_score")),
    }


def drift_file(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return temporal_degradation.json, of videos with as many windows as most have."""
    most = max(len(row["windows"]) for row in rows)
    table = np.array([row["windows"] for row in rows if len(row["windows"]) == most]) / 100
    values = table.mean(axis=0).tolist()
    return {
        "windows": {
            f"{i * WINDOW_S:g}-{(i + 1) * WINDOW_S:g}s": {"imaging_quality": value}
            for i, value in enumerate(values)
        },
        "trend": {
            "imaging_quality": {
                "first_window": values[0],
                "last_window": values[-1],
                "degradation": values[0] - values[-1],
            }
        },
    }


def report(rows: Sequence[Mapping[str, Any]], scenes: int, method: str, split: str) -> str:
    """Return the results as a page of Markdown."""
    lines = [
        f"# SANA-WM-Bench {split}: {method}",
        "",
        f"{len(rows)} of {scenes} scenes. Floor: the video's first frame frozen. The benchmark has"
        " no true videos, so there is no ceiling.",
        "",
        "| metric | mean | interval | median | floor | n | coverage |",
        "|---|---|---|---|---|---|---|",
    ]
    columns: dict[str, list[tuple[Score, Score]]] = {
        "revisit PSNR ↑ dB": [(row["psnr"], row["psnr_floor"]) for row in rows],
        "revisit SSIM ↑": [(row["ssim"], row["ssim_floor"]) for row in rows],
    }
    for name in rows[0]["cameras"]:
        columns[f"{name} ↓"] = [(row["cameras"][name], row["cameras_floor"][name]) for row in rows]
    columns["drift ↓"] = [(row["drift"], row["drift"]) for row in rows]
    lacking = []
    for name, scores in columns.items():
        found, floor = (summarise([pair[i] for pair in scores]).as_json() for i in (0, 1))
        if found["mean"] is None:
            lacking.append(f"- {name}: {found['reason']}")
            continue
        interval = found["interval"]
        span = "—" if interval is None else " to ".join(map(number, interval))
        floor_text = "0" if name.startswith("drift") else number(floor["mean"])
        lines.append(
            f"| {name} | {with_error(found)} | {span} | {number(found['median'])} | {floor_text} |"
            f" {found['n']} of {found['videos']} | {found['coverage']:.0%} |"
        )
    return "\n".join([*lines, "", *(["Not measured:", "", *lacking] if lacking else [])]) + "\n"
