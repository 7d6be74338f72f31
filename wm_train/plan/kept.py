"""Keep rehearsals on disk, so that a plan is instant when its shapes were rehearsed before.

The name of a file is a hash of everything that a rehearsal depends on: the stage's configuration,
sizes, world, device, torch, and the source of the packages. Files are plain JSON; a damaged one is
rehearsed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wm_train.config.curriculum import StagePlan
from wm_train.plan.frame import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.speed.collectives import Call
from wm_train.plan.tracing import Work
from wm_train.storage import read_regular

PACKAGES = ("wm_train", "parallel", "data_shards")


def folder() -> Path:
    """Return the folder of kept rehearsals, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wm_train" / "rehearsals"


def kept_or(
    make: Callable[[], Rehearsal],
    plan: StagePlan,
    frame: Frame,
    *rest: object,
    keep: Path | None = None,
) -> Rehearsal:
    """Return a kept rehearsal of these shapes, or else that of `make`, which is then kept."""
    path = (keep or folder()) / f"{fingerprint(plan, frame, *rest)}.json"
    try:
        return _from_json(json.loads(read_regular(path)))
    except (OSError, ValueError, KeyError, TypeError):
        made = make()
    draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(_to_json(made)))
        draft.replace(path)
    except OSError:  # a read-only or full home: the plan only takes longer next time
        draft.unlink(missing_ok=True)
    return made


def fingerprint(plan: StagePlan, frame: Frame, *rest: object) -> str:
    """Return a hash of what a rehearsal depends on."""
    facts = [asdict(plan.config), plan.launcher.workers, asdict(plan.backend), asdict(frame)]
    text = json.dumps([*facts, torch.__version__, *rest, source_digest()], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def source_digest() -> str:
    """Return a hash of the source files of the packages that a rehearsal runs."""
    total, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def _to_json(made: Rehearsal) -> dict[str, Any]:
    work = [[*key, *asdict(value).values()] for key, value in made.work.items()]
    calls = [[*call, count] for call, count in made.collectives.items()]
    return {**asdict(replace(made, work={}, collectives={})), "work": work, "collectives": calls}


def _from_json(data: dict[str, Any]) -> Rehearsal:
    work = {(phase, name): Work(*numbers) for phase, name, *numbers in data["work"]}
    calls = {Call(*call): count for *call, count in data["collectives"]}
    return Rehearsal(**{**data, "work": work, "collectives": calls})
