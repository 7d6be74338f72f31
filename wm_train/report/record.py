"""Read what a run has left in its folder: configuration, steps, starts, checkpoints and pictures.

Nothing is written here, and nothing that is missing or damaged is an error: a page is also made of
a run that has crashed, or is still going on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wm_train.checkpoint.manifest import CheckpointError, committed, read_manifest, step_of
from wm_train.config.curriculum import StagePlan, plan_stage
from wm_train.config.problems import ConfigError
from wm_train.config.typed import from_json
from wm_train.redact import clean_value
from wm_train.report.judged import Judged, read_judged
from wm_train.storage import Place
from wm_train.tracking.goodput import Life, productive, read_life, read_starts, read_typed
from wm_train.tracking.mlflow_record import METRICS
from wm_train.tracking.rows import read_rows

CONFIG = "config.json"
MOST_CHECKPOINTS = 12  # shown; a manifest is read for each


@dataclass(frozen=True)
class Saved:
    """Describe one checkpoint. problem: the reason why it cannot be used, or ""."""

    name: str
    step: int
    time: float = 0.0  # Unix seconds
    size: int = 0  # bytes of its files
    workers: int | None = None
    validation_loss: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class StageRecord:
    """Hold what one stage has left. plan: None when the configuration is of another version.

    config: the run's, without secrets. checkpoints: oldest first, at most MOST_CHECKPOINTS;
    kept_elsewhere: their address when they are in a store.
    """

    name: str
    folder: Path
    plan: StagePlan | None
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    damaged: int
    life: Life | None
    starts: list[dict[str, Any]]
    typed: list[dict[str, Any]]
    checkpoints: list[Saved]
    rewound: list[tuple[int, int]]
    samples: list[Path]
    contact_sheet: Path | None
    judged: Judged | None
    kept_elsewhere: str = ""
    pool: str | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the stage's own section of the configuration."""
        found: Mapping[str, Any] = self.config["recipe"]["stages"].get(self.name, {})
        return found

    @property
    def steps_done(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def status(self) -> str:
        """Return FINISHED, FAILED, KILLED or RUNNING, as the record has it; "" before a start."""
        return self.life.status if self.life else ""

    @property
    def last_seen(self) -> float:
        """Return the Unix time of the newest sign of life, 0 without any."""
        steps = self.rows[-1].get("time", 0.0) if self.rows else 0.0
        return max(steps, self.life.ended if self.life else 0.0)

    @property
    def useful_s(self) -> float:
        """Return the seconds of useful steps; of a life that has not ended, until now."""
        ended = self.life is not None and self.status != "RUNNING"
        return self.life.productive_s if ended and self.life else sum(map(productive, self.rows))

    @property
    def wall_s(self) -> float:
        """Return the seconds from the first start to the newest sign of life, without pauses."""
        return self.last_seen - self.life.started - self.life.paused_s if self.life else 0.0


@dataclass(frozen=True)
class RunRecord:
    """Hold what a run has left: its stages in order."""

    name: str
    folder: Path
    stages: list[StageRecord] = field(default_factory=list)

    @property
    def newest(self) -> StageRecord:
        """Return the stage that was started last."""
        return max(self.stages, key=lambda stage: stage.last_seen)


class NoRunError(ValueError):
    """Report a folder that holds no run."""


def read_run(folder: Path) -> RunRecord:
    """Read a run, `<out>/<name>`, or one stage of it. Raises NoRunError."""
    stages = [read_stage(place) for place in (folder, *sorted(folder.glob("*")))]
    # of a folder of runs, or of anything else that lies two levels up, no page is made
    pools = [read_stage(place) for place in sorted(folder.glob("*/*"))]
    stages += [stage for stage in pools if stage and stage.pool == stage.folder.parent.name]
    known = [stage for stage in stages if stage is not None]
    if not known:
        got = f"{folder}, which holds no stage" if folder.is_dir() else f"{folder}, no folder"
        raise NoRunError(
            f"report: got {got}, expected the folder of a run, <out>/<name>. Fix: python -m"
            " wm_train.report runs/demo"
        )
    known.sort(key=lambda stage: (stage.pool or "", stage.settings.get("index", 0), stage.name))
    return RunRecord(str(known[0].config.get("name", folder.name)), folder, known)


def read_stage(folder: Path) -> StageRecord | None:
    """Read the folder of a stage; None when it is none."""
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
        config = clean_value(json.loads(text))
        name = folder.name
        if name not in config["recipe"]["stages"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    path = folder / METRICS
    rows, damaged = read_rows(path) if path.exists() else ([], [])
    plan = read_plan(text, name)
    place: Place = folder / "checkpoints"
    if plan and plan.config.trainer.checkpoint_to:  # a folder that was moved has its own with it
        place = plan.checkpoints
    kept, rewound = read_checkpoints(place) if isinstance(place, Path) else ([], [])
    pictures = folder / "samples"
    sheet = pictures / "contact_sheet.png"
    return StageRecord(
        name=name,
        folder=folder,
        plan=plan,
        config=config,
        rows=rows,
        damaged=len(damaged),
        life=read_life(folder),
        starts=read_starts(folder),
        typed=read_typed(folder),
        checkpoints=kept,
        rewound=rewound,
        samples=sorted(pictures.glob("*.mp4")),
        contact_sheet=sheet if sheet.is_file() else None,
        judged=read_judged(folder),
        kept_elsewhere="" if isinstance(place, Path) else str(place),
        pool=config.get("pool"),
    )


def read_plan(text: str, stage: str) -> StagePlan | None:
    """Return the typed stage of a stored configuration; None when this version cannot read it."""
    try:
        return plan_stage(from_json(text), stage)
    except (ConfigError, ValueError, KeyError, TypeError):
        return None


def read_checkpoints(root: Path) -> tuple[list[Saved], list[tuple[int, int]]]:
    """Return the newest checkpoints, oldest first, and the ranges of steps that were left out after
    going back."""
    kept, rewound = [], list[tuple[int, int]]()
    for folder in committed(root)[-MOST_CHECKPOINTS:]:
        try:
            manifest = read_manifest(folder)
            time = (folder / "manifest.json").stat().st_mtime
        except (CheckpointError, OSError) as error:
            kept.append(Saved(folder.name, step_of(folder), problem=str(error)))
            continue
        rewound = [
            (first, last) for first, last in manifest.facts.get("guard", {}).get("rewound", [])
        ]
        kept.append(
            Saved(
                folder.name,
                manifest.step,
                time,
                sum(entry["size"] for entry in manifest.files.values()),
                manifest.facts.get("world"),
                manifest.facts.get("validation_loss"),
            )
        )
    return kept, rewound
