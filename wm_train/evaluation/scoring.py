"""Score one rolled-out clip, beside what makes its numbers mean something.

Each metric has four columns: `sample`; `ceiling`, the decoded truth in the sample's place; `floor`,
the first frame frozen; `other`, the sample judged by another clip's truth or path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.time_layout import TimeLayout
from wm_train.evaluation.metrics import pictures
from wm_train.evaluation.metrics.cameras import ALIGNMENTS, CameraErrors, camera_errors
from wm_train.evaluation.metrics.lasting import drift, memory_symmetry
from wm_train.evaluation.metrics.revisit import revisit, revisit_pairs
from wm_train.evaluation.metrics.score import Score, mean_score, unknown
from wm_train.evaluation.metrics.trajectory import trajectory_accuracy
from wm_train.evaluation.metrics.turns import turns_followed
from wm_train.evaluation.poses import KnownScene, PoseEstimator, PoseTrack

COLUMNS = ("sample", "ceiling", "floor", "other")
Video = NDArray[np.uint8]
Poses = NDArray[np.float64]
MIRROR = (0.25, 10.0)  # metres and degrees within which a path comes back the way it went


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its unit, and which way is better (1: more, -1: less)."""

    unit: str
    better: int


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("dB", 1),
    "ssim": Metric("", 1),
    "flickering": Metric("", 1),
    "rot_err_deg": Metric("degrees", -1),
    "trans_err_m": Metric("m", -1),
    "cam_mc": Metric("", -1),
    "rot_err_deg_rotations": Metric("degrees", -1),
    "trans_err_m_rotations": Metric("m", -1),
    "cam_mc_rotations": Metric("", -1),
    "rot_err_deg_umeyama": Metric("degrees", -1),
    "trans_err_m_umeyama": Metric("m", -1),
    "cam_mc_umeyama": Metric("", -1),
    "trajectory": Metric("", 1),
    "trajectory_mean": Metric("", 1),
    "trajectory_signed": Metric("", 1),
    "revisit_psnr": Metric("dB", 1),
    "revisit_ssim": Metric("", 1),
    "drift": Metric("", -1),
    "symmetry": Metric("", 1),
    "turns_followed": Metric("", 1),
}


@dataclass(frozen=True)
class JudgedClip:
    """Hold a sample [F, H, W, 3], its decoded truth, and the path [F, 4, 4] that was asked for,
    None in a data set without cameras. number: its place among the clips. mouse: [T], its motion
    to the right in units of its spread, None in a data set without; time: of its latents."""

    key: str
    number: int
    made: Video
    truth: Video
    fps: float
    c2w: Poses | None
    scene: KnownScene | None
    mouse: NDArray[np.float64] | None = None
    time: TimeLayout | None = None


@dataclass(frozen=True)
class Other:
    """Hold another clip's decoded truth, path and mouse."""

    truth: Video
    c2w: Poses | None
    mouse: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Judge:
    """Hold what clips are judged with. quality: scores [N, H, W, 3] pictures, or the reason why
    there is no such scorer."""

    groups: Sequence[str]
    estimator: PoseEstimator | None
    quality: Callable[[Video], NDArray[np.float64]] | str


Columns = dict[str, Score]


@dataclass
class ClipRecord:
    """Hold all scores of one clip: metric -> column -> score; series for tables by second; and what
    plots show."""

    key: str
    number: int
    frames: int
    fps: float
    scores: dict[str, Columns] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    track: PoseTrack | None = None
    errors: CameraErrors | None = None
    by_frame: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what is stored and exchanged; the path as numbers, None where unknown."""
        path = None
        if self.errors is not None:
            centres = self.errors.aligned[:, :3, 3]
            path = [row.tolist() if np.isfinite(row).all() else None for row in centres]
        return {
            "key": self.key,
            "number": self.number,
            "frames": self.frames,
            "fps": self.fps,
            "scores": {
                name: {column: asdict(score) for column, score in columns.items()}
                for name, columns in self.scores.items()
            },
            "seconds": self.seconds,
            "path": path,
            "estimator": None if self.track is None else self.track.name,
        }


def score_clip(clip: JudgedClip, other: Other | None, judge: Judge) -> ClipRecord:
    """Score a clip by the judge's groups of metrics."""
    record = ClipRecord(clip.key, clip.number, len(clip.made), clip.fps)
    frozen = np.repeat(clip.truth[:1], len(clip.truth), axis=0)
    for group in judge.groups:
        {
            "psnr": score_pictures,
            "cameras": score_cameras,
            "revisit": score_revisits,
            "drift": score_drift,
            "symmetry": score_symmetry,
            "turns": score_turns,
        }[group](record, clip, frozen, other, judge)
    return record


ONE_CLIP = unknown("there is no other clip to compare with")


def score_pictures(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Compare with the decoded truth, over the clip and by second; the given frames, those of the
    first latent, are not counted."""
    given = clip.time.first if clip.time else 1
    for name, compare in (("psnr", pictures.psnr), ("ssim", pictures.ssim)):
        frames = {
            "sample": pictures.by_frame(clip.truth, clip.made, compare),
            "floor": pictures.by_frame(clip.truth, frozen, compare),
        }
        scores = {column: mean_score(values[given:], "frames") for column, values in frames.items()}
        scores["ceiling"] = mean_score(
            pictures.by_frame(clip.truth[given:], clip.truth[given:], compare), "frames"
        )
        scores["other"] = (
            ONE_CLIP
            if other is None or other.truth.shape != clip.made.shape
            else mean_score(pictures.by_frame(other.truth, clip.made, compare)[given:], "frames")
        )
        record.scores[name] = scores
        record.by_frame[name] = frames["sample"]
        record.seconds[name] = {
            column: pictures.by_second(values, clip.fps, given) for column, values in frames.items()
        }
    steps = len(clip.made) - 1
    videos = {"sample": clip.made, "ceiling": clip.truth, "floor": frozen}
    if other is not None:
        videos["other"] = other.truth
    record.scores["flickering"] = {
        column: Score(pictures.temporal_flickering(video), steps, 1.0)
        for column, video in videos.items()
    }


def score_cameras(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Estimate the paths of sample and truth, and compare them with the path that was asked for.

    The frozen first frame needs no estimate: its camera stands still. Without a suffix the errors
    are those of a metric estimate, in the truth's world.
    """
    if clip.c2w is None or clip.scene is None or judge.estimator is None:
        why = "the data set has no camera paths" if clip.c2w is None else "there is no estimator"
        record.scores |= {name: dict.fromkeys(COLUMNS, unknown(why)) for name in camera_names()}
        return
    tracks = {
        "sample": judge.estimator.estimate(clip.made, clip.fps, clip.scene),
        "ceiling": judge.estimator.estimate(clip.truth, clip.fps, clip.scene),
    }
    still = np.repeat(clip.c2w[:1], len(clip.c2w), axis=0)
    tracks["floor"] = PoseTrack(still, True, np.ones(len(still)), "exact", 0.0)
    for alignment in ALIGNMENTS:
        found: dict[str, CameraErrors] = {}
        for column, track in tracks.items():
            # a camera that stands still has centres for no Sim(3): its orientations are aligned
            still_too = column == "floor" and alignment == "umeyama"
            how = "rotations" if still_too else alignment
            found[column] = camera_errors(clip.c2w, track.c2w, how)
        if other is not None and other.c2w is not None and len(other.c2w) == len(clip.c2w):
            found["other"] = camera_errors(other.c2w, tracks["sample"].c2w, alignment)
        metric = tracks["sample"].metric or tracks["ceiling"].metric
        for name in ("rot_err_deg", "trans_err_m", "cam_mc"):
            columns = {column: getattr(errors, name) for column, errors in found.items()}
            for column in ("sample", "ceiling"):
                if tracks[column].reason:
                    columns[column] = unknown(tracks[column].reason)
            if alignment == "none" and not metric:
                columns = dict.fromkeys(COLUMNS, unknown("the estimate has no metres"))
            suffix = "" if alignment == "none" else f"_{alignment}"
            record.scores[name + suffix] = {"other": ONE_CLIP, **columns}
        if alignment == ("none" if metric else "rotations"):
            record.track, record.errors = tracks["sample"], found["sample"]
            record.seconds["rot_err_deg"] = {
                column: pictures.by_second(errors.rotation, clip.fps)
                for column, errors in found.items()
            }
    judged = {column: trajectory_accuracy(clip.c2w, track.c2w) for column, track in tracks.items()}
    if other is not None and other.c2w is not None and len(other.c2w) == len(clip.c2w):
        judged["other"] = trajectory_accuracy(other.c2w, tracks["sample"].c2w)
    for name, part in (("", "passed"), ("_mean", "mean"), ("_signed", "signed")):
        columns = {column: getattr(accuracy, part) for column, accuracy in judged.items()}
        record.scores["trajectory" + name] = {"other": ONE_CLIP, **columns}


def camera_names() -> list[str]:
    """Return the metrics that need a camera path."""
    return [name for name in METRICS if name.startswith(("rot_", "trans_", "cam_", "trajectory"))]


def score_revisits(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Compare frames of one view. The frozen frame is perfect here: read it with the others."""
    videos = {"sample": clip.made, "ceiling": clip.truth, "floor": frozen}
    for name, compare in (("revisit_psnr", pictures.psnr), ("revisit_ssim", pictures.ssim)):
        if clip.c2w is None:
            lacking = unknown("the data set has no camera paths")
            record.scores[name] = dict.fromkeys(COLUMNS, lacking)
            continue
        pairs = revisit_pairs(clip.c2w, clip.fps)
        columns = {
            column: revisit(video, clip.fps, pairs, compare, clip.fps)[0]
            for column, video in videos.items()
        }
        strange = [] if other is None or other.c2w is None else revisit_pairs(other.c2w, clip.fps)
        columns["other"] = revisit(clip.made, clip.fps, strange, compare, clip.fps)[0]
        record.scores[name] = columns


def score_drift(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Measure how picture quality falls from the first window to the last."""
    videos = {"sample": clip.made, "ceiling": clip.truth, "floor": frozen}
    if other is not None:
        videos["other"] = other.truth
    quality = judge.quality
    record.scores["drift"] = {
        column: unknown(quality) if isinstance(quality, str) else drift(quality(video), clip.fps)
        for column, video in videos.items()
    }


def score_symmetry(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Measure the memory symmetry, where the path comes back the way it went."""
    videos = {"sample": clip.made, "ceiling": clip.truth, "floor": frozen}
    if other is not None:
        videos["other"] = other.truth
    reason = "the data set has no camera paths" if clip.c2w is None else not_mirrored(clip.c2w)
    record.scores["symmetry"] = {
        column: unknown(reason) if reason else memory_symmetry(video)
        for column, video in videos.items()
    }


def score_turns(
    record: ClipRecord, clip: JudgedClip, frozen: Video, other: Other | None, judge: Judge
) -> None:
    """Measure how often the picture turns with the mouse; `other` with that of another clip."""
    if clip.mouse is None or clip.time is None:
        lacking = unknown("the data set has no mouse")
        record.scores["turns_followed"] = dict.fromkeys(COLUMNS, lacking)
        return
    columns = {
        column: turns_followed(video, clip.mouse, clip.time)
        for column, video in (("sample", clip.made), ("ceiling", clip.truth), ("floor", frozen))
    }
    strange = other is not None and other.mouse is not None and len(other.mouse) == len(clip.mouse)
    columns["other"] = (
        turns_followed(clip.made, other.mouse, clip.time)
        if strange and other is not None and other.mouse is not None
        else ONE_CLIP
    )
    record.scores["turns_followed"] = columns


def not_mirrored(c2w: Poses) -> str:
    """Return why a path does not come back the way it went, "" if it does."""
    errors = camera_errors(c2w, c2w[::-1], "none", least=0.0)
    far, turned = errors.translation.max(), errors.rotation.max()
    if far <= MIRROR[0] and turned <= MIRROR[1]:
        return ""
    return f"the path does not come back the way it went: {far:.2f} m and {turned:.0f} degrees off"
