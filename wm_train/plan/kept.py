"""Keep rehearsals on disk, so that a plan is instant when its shapes were rehearsed before.

The name of a file is a hash of everything that a rehearsal depends on: the stage's configuration,
sizes, world, device, torch, and the source of the packages. Files are plain JSON; a damaged one is
rehearsed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from wm_train.backends.absent import KINDS
from wm_train.config.curriculum import StagePlan
from wm_train.config.schema import StageConfig
from wm_train.plan.depth import joined, shallow
from wm_train.plan.frame import Frame
from wm_train.plan.rehearsal import Rehearsal, rehearse
from wm_train.plan.speed.collectives import Call
from wm_train.plan.tracing import Work
from wm_train.storage import read_regular

PACKAGES = ("wm_train", "parallel", "data_shards")
# of a stage: nothing that a step's shapes depend on; `data` and `trainer` but for two of their keys
IDLE = {"index", "steps", "until_loss", "workers", "new", "reinitialise", "trajectories"}
IDLE |= {"inherit", "inherit_weights", "inherit_optimizer", "data", "trainer"}
RATES = {"lr", "warmup_steps", "schedule"}  # of an optimizer


def folder() -> Path:
    """Return the folder of kept rehearsals, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wm_train" / "rehearsals"


@dataclass(frozen=True)
class Job:
    """Name a rehearsal: the turn of a network of a plan, on the first rank, with the kernels of a
    kind of device (`KINDS`)."""

    plan: StagePlan
    frame: Frame
    role: str
    device: str

    def run(self) -> Rehearsal:
        """Return the rehearsal. Raises ReadsOnHost where the step cannot be rehearsed."""
        return rehearse(self.plan, self.frame, 0, self.role, KINDS[self.device])

    @property
    def fingerprint(self) -> str:
        """Return a hash of what it depends on."""
        own = [facts_of(self.plan.config), self.plan.launcher.workers, asdict(self.plan.backend)]
        rest = [asdict(self.frame), torch.__version__, self.role, self.device, source_digest()]
        return hashlib.sha256(json.dumps([*own, *rest], default=str).encode()).hexdigest()


def kept_or_made(
    jobs: Sequence[Job], processes: int = 1, keep: Path | None = None
) -> list[Rehearsal]:
    """Return the rehearsals, in order; those that are not kept are made, on so many processes, and
    kept. Raises ReadsOnHost where one cannot be made."""
    base = keep or folder()
    names = [job.fingerprint for job in jobs]
    found = {name: made for name in names if (made := _load(base / f"{name}.json"))}
    missing = {name: job for name, job in zip(names, jobs, strict=True) if name not in found}
    for name, made in zip(missing, _run_all([*missing.values()], processes), strict=True):
        _keep(base / f"{name}.json", made)
        found[name] = made
    return [found[name] for name in names]


def deep_rehearsals(
    plans: Sequence[StagePlan], frame: Frame, role: str, device: str, processes: int = 1
) -> list[Rehearsal]:
    """Return the rehearsals of turns of whole stages, from kept shallow ones (`depth.shallow`).
    Raises ReadsOnHost where one cannot be made."""
    parts = [[Job(one, frame, role, device) for one in shallow(plan)] for plan in plans]
    made = iter(kept_or_made([job for own in parts for job in own], processes))
    return [joined(plan, [*islice(made, len(own))]) for plan, own in zip(plans, parts, strict=True)]


def _run_all(jobs: Sequence[Job], processes: int) -> Iterable[Rehearsal]:
    if min(processes, len(jobs)) < 2:
        return map(Job.run, jobs)
    count = min(processes, len(jobs))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        return [*pool.map(Job.run, jobs)]


def _load(path: Path) -> Rehearsal | None:
    try:
        return _from_json(json.loads(read_regular(path)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, made: Rehearsal) -> None:
    draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(_to_json(made)))
        draft.replace(path)
    except OSError:  # a read-only or full home: the plan only takes longer next time
        draft.unlink(missing_ok=True)


def facts_of(config: StageConfig) -> dict[str, Any]:
    """Return what a rehearsal depends on in a stage: not how long it trains, from which weights, on
    which data, nor at which rate."""
    facts = {name: value for name, value in asdict(config).items() if name not in IDLE}
    facts |= {"pack": config.data.pack, "accumulate": config.trainer.accumulate}
    facts["optimizer"] = _without_rates(facts["optimizer"])
    facts["roles"] = {
        role: {
            name: _without_rates(value) if name == "optimizer" and value else value
            for name, value in own.items()
            if not name.startswith("inherit")
        }
        for role, own in facts["roles"].items()
    }
    return facts


def _without_rates(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in optimizer.items() if name not in RATES}


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
