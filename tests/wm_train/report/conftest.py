"""A finished run, written by the functions that a real one uses, without training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wm_train.checkpoint.manifest import Manifest, to_text
from wm_train.config.compose import compose
from wm_train.config.typed import to_json
from wm_train.evaluation.pictures import write_png, write_video
from wm_train.tracking.goodput import Life, write_life
from wm_train.tracking.rows import to_line

STEPS, FRAMES, FPS = 40, 9, 8.0
ADDRESS = "s3://us%65r:hunter2secret@store/demo"
STORE = "http://me:abcd1234token@mlflow.lab"
SECRETS = ("hunter2secret", "abcd1234token", "anothersecret9")


def film(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A ramp that moves, [F, H, W, 3] uint8."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    frames = [np.stack([x * 3, y * 4, x + y + seed + 9 * f], -1) % 256 for f in range(FRAMES)]
    return np.stack(frames).astype(np.uint8)


def summary(mean: float | None, **changes: object) -> dict[str, object]:
    """As `wm_train.evaluate` writes it, over videos."""
    known = {"mean": mean, "median": mean, "standard_error": 0.25, "interval": [1.5, 2.5]}
    return known | {"n": 16, "videos": 16, "coverage": 0.94, "reason": ""} | changes


def score(value: float | None) -> dict[str, object]:
    return {"value": value, "n": 9, "coverage": 0.9, "reason": ""}


MEASURES: dict[str, dict[str, Any]] = {
    "rot_err_deg": {
        "unit": "degrees",
        "better": "less",
        "sample": summary(2.0),
        "floor": summary(10.0),
        "ceiling": summary(0.0),
        "other": summary(21.0),
        "gain": summary(8.0),
        "own_better": 0.9375,
        "own_better_n": 16,
    },
    "psnr": {"unit": "dB", "better": "more", "sample": summary(27.125), "floor": summary(22.0)},
    "drift": {"sample": summary(None, reason="no weights of MUSIQ here")},
}
SECONDS = {"sample": [1.0, 3.0], "floor": [5.0, 15.0], "ceiling": [0.5, 0.5]}


def rows(steps: int = STEPS) -> list[dict[str, float]]:
    """One second a step, half a second apart from the next."""
    made = []
    for step in range(1, steps + 1):
        row = {"step": step, "time": 1000.0 + 1.5 * step, "loss": 1 + 1 / step, "step_s": 1.0}
        row |= {"lr": 1e-3, "grad_norm": 0.5, "frames_per_s": 80.0, "skipped": 0.0}
        if step % 10 == 0:
            levels = {f"validation_loss_sigma_{s}": s + 1 / step for s in (0.1, 0.5, 0.9)}
            row |= {"validation_loss": 1 + 2 / step, **levels}
        made.append(row)
    return made


def save(folder: Path, step: int, workers: int) -> None:
    """A checkpoint as the report reads it: its manifest."""
    place = folder / "checkpoints" / f"step_{step:08}"
    place.mkdir(parents=True)
    facts = {"world": workers, "validation_loss": 1 + 2 / step, "guard": {"rewound": [[5, 7]]}}
    files = {"rank_00000.safetensors": {"size": 3_500_000, "sha256": "0" * 64}}
    (place / "manifest.json").write_text(to_text(Manifest(step, "short", facts, {}, files)))


@pytest.fixture(scope="session")
def configuration() -> str:
    """A run's configuration as its command stores it."""
    line = ["experiment=demo", "recipe=demo", "stage=short", f"data.path={ADDRESS}"]
    line += ["recipe.stages.short.steps=40", "parallel.cp=2", f"tracker.uri={STORE}"]
    return to_json(compose(line))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples and the evaluation of a stage."""
    folder = tmp_path_factory.mktemp("pictures")
    for place in ("samples", "evaluation/samples", "evaluation/paths"):
        (folder / place).mkdir(parents=True)
    for clip in range(2):
        write_video(folder / "samples" / f"clip{clip}.mp4", film(40 * clip), FPS)
    write_video(folder / "evaluation" / "samples" / "clip0.mp4", film(80), FPS)
    write_png(folder / "evaluation" / "paths" / "clip0.png", film(0)[0])
    write_png(folder / "samples" / "contact_sheet.png", film(0)[0])
    write_judged(folder, MEASURES)
    return folder


@pytest.fixture
def write_run(tmp_path: Path, configuration: str, pictures: Path) -> Callable[..., Path]:
    """write_run(seen=True) -> the folder of a run with one finished stage; seen: with pictures and
    an evaluation."""

    def write(seen: bool = True) -> Path:
        folder = tmp_path / "runs" / "demo" / "short"
        shutil.copytree(pictures, folder) if seen else folder.mkdir(parents=True)
        (folder / "config.json").write_text(configuration)
        (folder / "metrics.jsonl").write_text("".join(map(to_line, rows())))
        life = Life(980.0, 3, 4, status="FINISHED", ended=1080.0, productive_s=40.0)
        write_life(folder, life)
        starts = [(0, 980.0, 4, 0), (10, 1020.0, 2, 4), (20, 1040.0, 4, 0)]
        kinds = ("step", "time", "workers", "redone")
        lines = [to_line(dict(zip(kinds, start, strict=True))) for start in starts]
        (folder / "starts.jsonl").write_text("".join(lines))
        typed = ["experiment=demo", "name=my demo", f"data.path={ADDRESS}"]
        (folder / "typed.jsonl").write_text(json.dumps({"time": 980.0, "typed": typed}) + "\n[3]\n")
        save(folder, 30, 2)
        save(folder, 40, 4)
        return folder.parent

    return write


def write_judged(folder: Path, measures: Mapping[str, Any]) -> None:
    """The evaluation of step 40, and one of step 20 that was at 3.25 degrees."""
    target = folder / "evaluation"
    target.mkdir(parents=True, exist_ok=True)
    seconds = {column: [summary(mean) for mean in means] for column, means in SECONDS.items()}
    angles = {"sample": score(1.75), "floor": score(9.5), "ceiling": score(0.25)}
    scores = {"rot_err_deg": angles, "psnr": {"sample": score(27.125), "floor": score(20.0)}}
    judged = {
        "format": 1,
        "step": 40,
        "poses": "map",
        "summary": measures,
        "seconds": {"rot_err_deg": seconds},
        "clips": [{"key": "clip0", "scores": scores}],
    }
    (target / "evaluation.json").write_text(json.dumps(judged))
    (target / "step_00000040.json").write_text(json.dumps(judged))
    before = {"step": 20, "summary": {"rot_err_deg": {"sample": summary(3.25)}}}
    (target / "step_00000020.json").write_text(json.dumps(before))
