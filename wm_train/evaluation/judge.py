"""Evaluate what a stage has learned: score its sampled clips, and write the results for people and
for programs into `<stage folder>/evaluation/`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.schema import DataError
from data_shards.time_layout import time_of
from wm_train.config.schema import TrainerConfig
from wm_train.console import Progress
from wm_train.errors import SetupError
from wm_train.evaluation import results
from wm_train.evaluation.metrics.turns import mouse_column
from wm_train.evaluation.pictures import write_png, write_video
from wm_train.evaluation.plots import judged_video, path_inset, path_plot
from wm_train.evaluation.poses import PoseEstimator, make_estimator
from wm_train.evaluation.samples import Sampled, decode
from wm_train.evaluation.scene import Recording, known_scene
from wm_train.evaluation.scorers import FRAME_SCORERS, make_scorer
from wm_train.evaluation.scoring import ClipRecord, Judge, JudgedClip, Other, score_clip
from wm_train.tracking.mlflow_record import Subject
from wm_train.tracking.tracker import Note, Tracker, send
from wm_train.training.stage import Stage

FOLDER = "evaluation"
TABLE = "clips.json"  # of all clips and metrics


def evaluate_samples(
    stage: Stage,
    sampled: Sampled,
    step: int,
    folder: Path,
    tracker: Tracker | None,
    progress: Progress,
    pictures: bool = True,
) -> dict[str, Any]:
    """Score sampled clips by `trainer.evaluate`; return the results on every rank.

    Every rank must call this: clip i is scored by rank i modulo the world size, which also writes
    its pictures, and the first rank writes the rest. Raises SetupError for what a user must change.
    """
    trainer, world = stage.config.trainer, stage.world
    target = folder / FOLDER
    mine, problem = list[dict[str, Any]](), ""
    try:
        judge, weights = make_judge(trainer)
        recording = Recording(Path(trainer.recording)) if trainer.recording else None
        for place in range(world.rank, len(sampled.keys), world.size):
            clip = judged_clip(stage, sampled, place, recording)
            record = score_clip(clip, other_clip(stage, sampled, place), judge)
            mine.append(record.as_json())
            if pictures:
                draw(target, clip, record)
    except DataError as error:  # on one rank alone: the others wait for its records
        problem = str(error)
    problems = [found for found in world.gather(problem) if found]
    if problems:
        raise SetupError(f"evaluation: {problems[0]}")
    records = [record for rows in world.gather(mine) for record in rows]
    facts = {
        "name": f"{stage.plan.run}/{stage.plan.stage}",
        "step": step,
        "metrics": list(trainer.evaluate),
        "poses": trainer.poses.partition(":")[0],
        "steps_of_sampler": trainer.sample_steps,
        "weights": weights,
    }
    found = results.combine(records, facts)
    if world.rank == 0:
        write(target, found)
    if tracker is not None:
        record_in(tracker.note, target, found, records if pictures else [])
        progress.say(f"evaluation: {(target / 'report.md').absolute()}{headline(found)}")
    return found


def make_judge(trainer: TrainerConfig) -> tuple[Judge, dict[str, dict[str, str]]]:
    """Return the judge that the configuration describes, and the weights of its scorers by name.
    Raises DataError where a part is unknown, or missing and `evaluate_strict`."""
    estimator: PoseEstimator | None = None
    if "cameras" in trainer.evaluate:
        estimator = make_estimator(trainer.poses)
    quality: Callable[[Any], Any] | str = "no scorer of picture quality was asked for"
    weights: dict[str, dict[str, str]] = {}
    if "drift" in trainer.evaluate:
        name = trainer.quality
        scorer, reason = make_scorer(FRAME_SCORERS, name, trainer.evaluate_strict)
        quality = reason if scorer is None else scorer.score
        if scorer is not None:
            weights[name] = dict(scorer.weights)
    return Judge(trainer.evaluate, estimator, quality), weights


def judged_clip(
    stage: Stage, sampled: Sampled, place: int, recording: Recording | None
) -> JudgedClip:
    """Return a sampled clip, decoded, with what may be known of its scene."""
    key, c2w, scene = sampled.keys[place], None, None
    if sampled.c2w is not None and sampled.intrinsics is not None:
        c2w = sampled.c2w[place].double().numpy()
        lenses = sampled.intrinsics[place].double().numpy()
        scene = known_scene(recording, key, rigid(c2w), lenses)
        c2w = rigid(c2w)
    made, truth = decode(stage, sampled.made[place]), decode(stage, sampled.truth[place])
    info = stage.dataset.info
    mouse, time = mouse_of(stage, sampled, place), time_of(info)
    return JudgedClip(key, place, made, truth, info.fps, c2w, scene, mouse, time)


def mouse_of(stage: Stage, sampled: Sampled, place: int) -> np.ndarray | None:
    """Return the mouse's motion to the right up to each latent frame of a clip, [T]; None in a data
    set without."""
    column = mouse_column(stage.dataset.info.control_names)
    if sampled.control_rows is None or column is None:
        return None
    return sampled.control_rows[place, :, column].double().numpy()


def rigid(c2w: np.ndarray) -> np.ndarray:
    """Return float32 poses [F, 4, 4] with rotations that are exact in double."""
    u, _, vt = np.linalg.svd(c2w[:, :3, :3])
    exact = c2w.copy()
    exact[:, :3, :3] = u @ vt
    return exact


def other_clip(stage: Stage, sampled: Sampled, place: int) -> Other | None:
    """Return the next clip in order, None if there is one clip only."""
    count = len(sampled.keys)
    if count < 2:
        return None
    following = (place + 1) % count
    c2w = None if sampled.c2w is None else rigid(sampled.c2w[following].double().numpy())
    mouse = mouse_of(stage, sampled, following)
    return Other(decode(stage, sampled.truth[following]), c2w, mouse)


def draw(target: Path, clip: JudgedClip, record: ClipRecord) -> None:
    """Write a clip's video and, where its path was estimated, the plot of it."""
    (target / "samples").mkdir(parents=True, exist_ok=True)
    errors, inset = record.errors, None
    if errors is not None and clip.c2w is not None:
        (target / "paths").mkdir(exist_ok=True)
        picture = path_plot(clip.key, clip.c2w, errors, clip.fps)
        write_png(target / "paths" / f"{clip.key}.png", picture)
        inset = path_inset(clip.c2w, errors.aligned)
    elif clip.c2w is not None:
        inset = path_inset(clip.c2w, None)
    film = judged_video(clip.truth, clip.made, record.by_frame.get("psnr"), inset)
    write_video(target / "samples" / f"{clip.key}.mp4", film, clip.fps)


def write(target: Path, found: dict[str, Any]) -> None:
    """Write the results: the newest under fixed names, and those of each step for later ones."""
    target.mkdir(parents=True, exist_ok=True)
    before = results.earlier(target, found["step"])
    results.write_json(results.history_file(target, found["step"]), found)
    results.write_json(target / "evaluation.json", found)
    results.write_json(target / TABLE, results.table_of_clips(found))
    (target / "report.md").write_text(results.report(found, before), encoding="utf-8")


def record_later(subject: Subject, folder: Path, found: dict[str, Any]) -> None:
    """Record the results of a stage that has ended, and send them where the run is tracked."""
    record_in(Note(folder), folder / FOLDER, found, found["clips"])
    if subject.tracker.name == "mlflow":
        send(subject, folder, print)


def record_in(
    tracker: Note, target: Path, found: dict[str, Any], drawn: list[dict[str, Any]]
) -> None:
    """Record figures, the report and the clips' pictures."""
    tags = {"eval.poses": found["poses"], "eval.clips": str(len(found["clips"]))}
    # by this tag MLflow knows an artifact as a table
    tags["mlflow.loggedArtifacts"] = json.dumps([{"path": TABLE, "type": "table"}])
    tracker.evaluation(found["step"], results.figures(found), tags)
    files = [target / "evaluation.json", target / TABLE, target / "report.md"]
    for record in drawn:
        files += [target / "samples" / f"{record['key']}.mp4"]
        if record["path"] is not None:
            files.append(target / "paths" / f"{record['key']}.png")
    for file in files:
        tracker.artifact(file)


def headline(found: dict[str, Any]) -> str:
    """Return the first numbers in a few words, each with its floor and coverage."""
    said = []
    for name, unit in (("psnr", "dB"), ("rot_err_deg", "degrees")):
        summary = found["summary"].get(name)
        if summary is not None and results.shown(summary):
            value, floor = summary["sample"]["mean"], summary["floor"]["mean"]
            share = summary["sample"]["coverage"]
            assert math.isfinite(value)
            said.append(f"{value:.2f} {unit}, frozen {floor:.2f}, coverage {share:.0%}")
    return f" ({'; '.join(said)})" if said else ""
