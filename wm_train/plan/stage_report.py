"""Report what a plan has found of one stage, and keep it on disk with the rehearsals.

A stage that was planned before, with the same settings but for rates and lengths, is printed again
in seconds: nothing is imported that a plan computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.degrees import sequence_size
from wm_train.backends.absent import facts_of_machine
from wm_train.config.curriculum import StagePlan
from wm_train.config.kinds import OptimizerConfig
from wm_train.config.roles import STUDENT, turns_of
from wm_train.plan.arguments import GIB, RUNTIME, Asked, Frames
from wm_train.plan.latents import Frame
from wm_train.plan.store import folder, keep, load, name_of, report_settings

if TYPE_CHECKING:
    from wm_train.plan.memory import Memory


Source = Callable[[StagePlan], str]


@dataclass(frozen=True)
class StageReport:
    """Hold what a plan says of a stage: its lines, kept without those of `head_lines` and
    `verdict`; the bytes of tensors on its device, and those of the device's runtime; with
    --hardware the seconds that it takes, None where no time is known."""

    lines: list[str]
    device: int
    runtime: int
    seconds: float | None = None

    def fits(self, gib: float | None) -> bool:
        """Return whether a device of so many GiB, None for any, holds it."""
        return gib is None or self.device + self.runtime <= gib * GIB


def stage_reports(
    plans: Sequence[StagePlan], frames: Frames, asked: Asked, settings: Any, source: Source
) -> Iterator[StageReport]:
    """Yield what a plan says of each stage, in order. Those that are not kept are rehearsed all at
    once.

    settings: all of the run, on any of which a report may depend; source: says where a stage's
    weights come from. Errors: those of `planned` and of `source`.
    """
    paths = {plan.stage: _path(plan, frames[plan.stage], asked, settings) for plan in plans}
    kept = {stage: _kept(path) for stage, path in paths.items()}
    missing = [plan for plan in plans if kept[plan.stage] is None]
    with _ahead(missing, frames, asked) as wait:
        for plan in plans:
            frame, found = frames[plan.stage], kept[plan.stage]
            if found is None:
                wait(plan)
                found = planned(plan, frame, asked, source, paths[plan.stage])
            lines = [*head_lines(plan, frame), *found.lines, *verdict(found, asked.device_gib)]
            yield replace(found, lines=lines)


@contextmanager
def _ahead(
    plans: Sequence[StagePlan], frames: Frames, asked: Asked
) -> Iterator[Callable[[StagePlan], None]]:
    """Begin the rehearsals of stages; yield a function that waits for those of one of them."""
    if not plans:
        yield lambda plan: None
        return
    from wm_train.plan.device_memory import jobs_of
    from wm_train.plan.kept import rehearsed_ahead

    jobs = {p.stage: jobs_of(p, frames[p.stage], kind_of(p, asked)) for p in plans}
    every = (job for own in jobs.values() for job in own)
    with rehearsed_ahead(every, asked.processes) as wait:
        yield lambda plan: wait(jobs[plan.stage])


def planned(plan: StagePlan, frame: Frame, asked: Asked, source: Source, path: Path) -> StageReport:
    """Plan a stage, and keep at a path what is said of it, but for its head and its verdict.
    Errors: those of `turn_memories_of` and `source`."""
    from wm_train.plan.device_memory import can_rehearse, turn_memories_of

    turns, shape, made = turn_memories_of(plan, frame, kind_of(plan, asked), asked.processes)
    memory = max(turns.values(), key=lambda one: one.device)
    lines = describe(plan, shape, memory, source(plan))
    lines += job_lines(plan, frame)
    for role, one in turns.items() if plan.config.roles else ():
        lines.append(f"  turn of the {role}: {_sizes(one)}")
    if asked.blocks:
        from wm_train.plan.speed.blocks import block_lines

        sides = (frame.height, frame.width, frame.temporal_stride)
        grouped = frame.time(plan.config.frames).layout == "grouped"
        lines += block_lines(plan.config, shape[2], sides, grouped)
    seconds = None
    if asked.profile:
        from wm_train.plan.scaling.advice import advice_lines
        from wm_train.plan.speed.report import stage_seconds, time_lines

        lines += time_lines(plan, frame, made, asked.profile)
        lines += advice_lines(plan, made, asked.profile, memory.trained)
        seconds = stage_seconds(plan, made, asked.profile)
    runtime = 0 if kind_of(plan, asked) == "cpu" else RUNTIME
    found = StageReport(lines, memory.device, runtime, seconds)
    if made or not can_rehearse(plan.config):  # else a line on standard error says why
        keep(path, asdict(found))
    return found


def _kept(path: Path) -> StageReport | None:
    found = load(path)
    try:
        return None if found is None else StageReport(**found)
    except TypeError:  # damaged
        return None


def _path(plan: StagePlan, frame: Frame, asked: Asked, settings: Any) -> Path:
    own = report_settings(settings, timed=asked.profile is not None)
    wanted = asdict(replace(asked, processes=1, device_gib=None))
    facts = [own, plan.stage, asdict(frame), wanted, facts_of_machine()]
    return folder() / f"report-{name_of(facts)}.json"


def kind_of(plan: StagePlan, asked: Asked) -> str:
    """Return the kind of device that a stage is planned for."""
    from wm_train.backends.absent import likely_kind

    half = plan.config.parallel.precision != "fp32"
    return asked.device or likely_kind(plan.backend.name, half)


def role_lines(plan: StagePlan) -> list[str]:
    """Return a line for each network beside the student: its source, and how it trains."""
    lines, turns = [], plan.config.turns
    for role, own in plan.config.roles.items():
        source = plan.role_sources[role]
        whose = "the student's start" if source is None else source.stage or source.checkpoints
        if source is not None and source.role != STUDENT:
            whose = f"{source.role} of {whose}"
        how = "frozen"
        if own.optimizer is not None:
            count = turns_of(turns, role, len(turns))
            how = f"{_rates(own.optimizer)}, {count} of {len(turns)} turns"
        lines.append(f"  {role}: from {whose}; {how}")
    return lines


def job_lines(plan: StagePlan, frame: Frame) -> list[str]:
    """Return a line about the data job that the stage begins with, if it has one."""
    from wm_train.plan.device_memory import clip_shape
    from wm_train.plan.turns import job_memory

    job, source = plan.config.trajectories, plan.teacher_source
    if job is None or source is None:
        return []
    shards = plan.launcher.workers // plan.config.parallel.dp_replicate
    memory = job_memory(plan.config, clip_shape(plan, frame)[0], shards)
    passes = job.steps * (1 + len(job.guidance))
    return [
        f"  begins with trajectories of {job.clips or 'all'} clips by the teacher of"
        f" {source.stage or source.checkpoints}, about {passes} passes a clip: {_sizes(memory)}"
    ]


def _sizes(memory: Memory) -> str:
    """Return what is on the device, in GiB."""
    held = (
        f"{name} {size / GIB:.2f}"
        for name, size in memory.categories().items()
        if name not in memory.offloaded
    )
    return f"{', '.join(held)}; together {memory.device / GIB:.2f}"


def head_lines(plan: StagePlan, frame: Frame) -> list[str]:
    """Return the first lines of a stage, which show what a kept report does not depend on: how long
    it trains, and its rates."""
    config = plan.config
    until = f" or a held-out loss of {config.until_loss:g}" if config.until_loss else ""
    whole = frame.time(config.frames).latents(config.frames)
    return [
        f"stage {config.index} {plan.stage}: {config.frames} frames = {whole} latent frames, "
        f"{config.steps:,} steps{until} of {config.global_batch} clips",
        f"  trained with {_rates(config.optimizer)}",
        *role_lines(plan),
    ]


def verdict(found: StageReport, gib: float | None) -> list[str]:
    """Return the line that says whether a stage fits in --memory, none without it."""
    if gib is None:
        return []
    advice = "try model.activation_checkpointing=block, a larger parallel.cp, or more workers"
    said = "fits" if found.fits(gib) else f"DOES NOT FIT: {advice}"
    runtime = f" and {found.runtime / GIB:g} of the runtime" if found.runtime else ""
    return [f"  {found.device / GIB:.2f}{runtime} of {gib:g} GiB: {said}"]


def _rates(optimizer: OptimizerConfig) -> str:
    return f"{optimizer.name} lr {optimizer.lr:g}, {optimizer.schedule}"


def describe(
    plan: StagePlan, shape: tuple[int, int, int], memory: Memory, source: str
) -> list[str]:
    """Return the lines of one stage that say what it starts from, and what each worker holds."""
    mesh, workers = plan.config.parallel, plan.launcher.workers
    clips, held, _ = shape
    trained = "" if memory.trained == memory.parameters else f", {memory.trained:,} trained"
    replicas = f"{mesh.dp_replicate} replicas x " if mesh.dp_replicate > 1 else ""
    size = sequence_size(mesh)
    data = workers // size // mesh.dp_replicate
    return [
        f"  starts from {source}; {mesh.precision}",
        (
            f"  {workers} workers = {replicas}{data} data parallel x "
            f"{size} sequence parallel; "
            f"each holds {clips} clips x {held} latent frames at once"
        ),
        f"  {memory.parameters:,} parameters{trained}; GiB per worker: {_sizes(memory)}",
        f"  host memory: staging {memory.staging / GIB:.2f} to save from"
        + "".join(f", {name} {memory.categories()[name] / GIB:.2f}" for name in memory.offloaded)
        + f"; together {memory.host / GIB:.2f}"
        + (
            f"; on the disk {memory.disk / GIB:.2f} of master weights and optimizer"
            if memory.disk
            else ""
        ),
    ]
