"""Keep rehearsals on disk, so that a plan is instant when its shapes were rehearsed before.

The name of a file (`store.py`) is a hash of everything that a rehearsal depends on: the stage's
configuration, sizes, world, device, torch, and the source of the packages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_shards.encoding.runners import leave_with_parent
from wm_train.backends.absent import KINDS
from wm_train.config.curriculum import StagePlan
from wm_train.plan.depth import joined, shallow
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal, rehearse
from wm_train.plan.speed.collectives import Call
from wm_train.plan.store import facts_of, folder, load, name_of
from wm_train.plan.store import keep as keep_json
from wm_train.plan.tracing import Work


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
        kind = self.device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it is said where one trains
            return rehearse(self.plan, self.frame, 0, self.role, KINDS[kind], on_host=kind == "cpu")

    @property
    def fingerprint(self) -> str:
        """Return a hash of what it depends on."""
        own = [facts_of(self.plan.config), self.plan.launcher.workers, asdict(self.plan.backend)]
        return name_of([*own, asdict(self.frame), self.role, self.device])


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
        keep_json(base / f"{name}.json", _to_json(made))
        found[name] = made
    return [found[name] for name in names]


@contextmanager
def rehearsed_ahead(
    jobs: Iterable[Job], processes: int, keep: Path | None = None
) -> Iterator[Callable[[Iterable[Job]], None]]:
    """Begin the rehearsals that are not kept, on so many processes, all at once, so that no core
    waits for the last of each stage. Yields a function that waits until some of them are kept."""
    base = keep or folder()
    named = {job.fingerprint: job for job in jobs}
    missing = {n: job for n, job in named.items() if _load(base / f"{n}.json") is None}
    if min(processes, len(missing)) < 2:
        yield lambda _: None
        return
    with _pool(processes) as pool:
        begun = {name: pool.submit(_run_and_keep, job, base) for name, job in missing.items()}

        def wait(own: Iterable[Job]) -> None:
            for job in own:
                if one := begun.get(job.fingerprint):
                    one.exception()  # raised again where it is needed

        try:
            yield wait
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(processes: int) -> ProcessPoolExecutor:
    """Return processes that end when this one is killed."""
    return ProcessPoolExecutor(processes, get_context("spawn"), leave_with_parent)


def _run_and_keep(job: Job, base: Path) -> None:
    keep_json(base / f"{job.fingerprint}.json", _to_json(job.run()))


def _run_all(jobs: Sequence[Job], processes: int) -> Iterable[Rehearsal]:
    if min(processes, len(jobs)) < 2:
        return map(Job.run, jobs)
    count = min(processes, len(jobs))
    with _pool(count) as pool:
        return [*pool.map(Job.run, jobs)]


def deep_rehearsals(
    plans: Sequence[StagePlan], frame: Frame, role: str, device: str, processes: int = 1
) -> list[Rehearsal]:
    """Return the rehearsals of turns of whole stages, from kept shallow ones (`depth.shallow`).
    Raises ReadsOnHost where one cannot be made."""
    parts = [[Job(one, frame, role, device) for one in shallow(plan)] for plan in plans]
    made = iter(kept_or_made([job for own in parts for job in own], processes))
    return [joined(plan, [*islice(made, len(own))]) for plan, own in zip(plans, parts, strict=True)]


def _load(path: Path) -> Rehearsal | None:
    try:
        return _from_json(load(path))
    except (ValueError, KeyError, TypeError):
        return None


def _to_json(made: Rehearsal) -> dict[str, Any]:
    work = [[*key, *asdict(value).values()] for key, value in made.work.items()]
    calls = [[*call, count] for call, count in made.collectives.items()]
    return {**asdict(replace(made, work={}, collectives={})), "work": work, "collectives": calls}


def _from_json(data: dict[str, Any]) -> Rehearsal:
    work = {(phase, name): Work(*numbers) for phase, name, *numbers in data["work"]}
    calls = {Call(*call): count for *call, count in data["collectives"]}
    return Rehearsal(**{**data, "work": work, "collectives": calls})
