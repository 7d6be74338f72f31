"""Train a stage: batch -> step -> record -> validate -> checkpoint, until its last step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from data_shards.schema import DataError
from wm_train.backends.protocol import Backend
from wm_train.checkpoint.saver import Saver
from wm_train.config.curriculum import StagePlan
from wm_train.console import Progress, complain
from wm_train.errors import SetupError, StorageError
from wm_train.evaluation.held_out import held_out_loss
from wm_train.evaluation.judge import evaluate_samples, make_judge
from wm_train.evaluation.rollout_statistics import (
    critic_floors,
    gate_problem,
    over_floor,
    rollout_statistics,
)
from wm_train.evaluation.samples import roll_out, show_samples
from wm_train.evaluation.turn_record import show_turns
from wm_train.resilience.guard import BadStepError, Guard, RewindError
from wm_train.resilience.heartbeat import Heartbeat, missing_ranks, silent_ranks
from wm_train.resilience.preemption import Preempted, StopRequest, StopSeenError
from wm_train.resilience.replicas import check_replicas
from wm_train.resilience.stragglers import Stragglers
from wm_train.tracking.profiling import StepProfiler, steps_to_profile
from wm_train.tracking.tracker import Tracker
from wm_train.training.ahead import Ahead
from wm_train.training.data import open_loader
from wm_train.training.networks import build_networks
from wm_train.training.resume import Start, restore
from wm_train.training.rewind import rewind
from wm_train.training.stage import Stage, open_stage
from wm_train.training.state import TrainState, facts
from wm_train.training.step import speed, train_step
from wm_train.training.step_clock import StepClock
from wm_train.training.trajectories import make_trajectories
from wm_train.world import World


def train_stage(
    plan: StagePlan, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Train the stage named `plan.stage` from its newest checkpoint to its last step, then sample;
    before it, make the trajectories that it trains on, where it asks for them.

    Errors: SetupError for what the user must change, until the first step is taken; DataError for
    data that is damaged or cannot be read; BadStepError from the guard; Preempted after `stop` was
    raised on any process and the state was saved.
    """
    with setup_mistakes():
        if plan.config.trainer.samples:
            make_judge(plan.config.trainer)  # what it lacks would show at the end
        prepare_stage(plan, backend, world, progress, stop)
        stage = open_stage(plan, backend, world)
        state = build_networks(plan, stage.mesh.fsdp, backend.device)
        start = restore(
            plan, state, stage.data_fingerprint, world, progress.say, stage.dataset.info.fps
        )
    stop.work_from_here()
    folder = plan.directory
    folder.mkdir(parents=True, exist_ok=True)
    tracker = None
    if world.rank == 0:
        tracker = Tracker(plan, folder, start.steps_done, progress.say, world.size)
    outcome = "FAILED"
    try:
        progress.mark("model and data")
        with Heartbeat(folder / "heartbeats", world.rank) as pulse:
            clock, last = StepClock(stage, state), None
            while last is None:
                try:
                    last = run_steps(stage, state, start, tracker, progress, stop, pulse, clock)
                except RewindError as request:
                    start = rewind(plan, state, request, world, progress.say)
                    if tracker:
                        tracker.rewind(start.steps_done)
            pulse.at(stage.config.steps, "samples")
            stop.all_saved(f"asked to stop: stage {plan.stage} is saved, its samples are not made")
            show_and_judge(stage, state, last, folder, tracker, progress)
        outcome = "FINISHED"
    except Preempted:
        outcome = "KILLED"
        raise
    except RuntimeError:  # what torch raises when a collective times out or loses its peer
        for line in missing_ranks(folder / "heartbeats", world.size):
            complain(f"rank {world.rank}: {line}")
        raise
    finally:
        if state.zero:
            state.zero.close()
        if tracker:
            tracker.close(outcome, timeout_s=30.0 if outcome == "FINISHED" else 5.0)


def prepare_stage(
    plan: StagePlan, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Run the data job of a stage, if it has one. Errors: those of `make_trajectories`, with
    SetupError for any other ValueError."""
    if plan.config.trajectories:
        with setup_mistakes():
            make_trajectories(plan, backend, world, progress, stop)


@contextmanager
def setup_mistakes() -> Iterator[None]:
    """Raise any ValueError of this block as SetupError, so that no restart repeats it.

    A DataError passes unchanged: its kind determines the exit code of the rank.
    """
    try:
        yield
    except (SetupError, DataError):
        raise
    except ValueError as error:
        raise SetupError(str(error)) from error


def run_steps(
    stage: Stage,
    state: TrainState,
    start: Start,
    tracker: Tracker | None,
    progress: Progress,
    stop: StopRequest,
    pulse: Heartbeat,
    clock: StepClock,
) -> int:
    """Take the remaining steps and record each, with a checkpoint every `trainer.checkpoint_every`,
    at the end and on a stop request; return the last step.

    Errors: StorageError when the last one could not be saved, BadStepError and RewindError from the
    guard, CorruptionError when replicas differ, Preempted.
    """
    plan, trainer, steps = stage.plan, stage.config.trainer, stage.config.steps

    def due(step: int) -> bool:
        return step == steps or bool(trainer.validate_every and step % trainer.validate_every == 0)

    held_out = start.validation_loss
    owed = start.steps_done and due(start.steps_done) and math.isnan(held_out)
    if owed and stage.config.until_loss:  # a stop came before it, and it may end the stage here
        held_out = held_out_loss(stage, state).get("validation_loss", math.nan)
    initial = first_rollouts(stage, state, progress, stop) if not start.steps_done else {}
    floors = critic_floors(stage, state, stop)
    if start.steps_done >= steps or gate_passed(stage, held_out):
        progress.say(
            f"stage {plan.stage} has ended already, after {start.steps_done} of {steps} steps"
        )
        return start.steps_done
    folder = plan.directory
    guard, stragglers = Guard(trainer, start.guard), Stragglers(trainer.straggler_factor)
    profiler = StepProfiler(
        steps_to_profile(trainer.profile) if tracker else range(0),
        folder / "profile",
        stage.backend.profiler,
    )
    lost = partial(
        silent_ranks, folder / "heartbeats", stage.world.size, plan.backend.collective_timeout_s
    )
    saver = Saver(plan.checkpoints, plan.stage, trainer, stage.world, progress.say, lost)
    with open_loader(
        stage, "train", stage.config.global_batch, start.steps_done, start.quarantined, progress.say
    ) as loader:
        if loader.packing:
            progress.say(loader.packing)
        saved, batches = start.steps_done, Ahead(stage, state, loader, clock.comm)

        def save(step: int) -> None:
            nonlocal saved
            if step == saved:
                return
            known = held_out if math.isfinite(held_out) else None
            known_facts = facts(
                plan,
                stage.data_fingerprint,
                stage.world,
                guard.memory(),
                known,
                loader.quarantined,
                stage.dataset.info.fps,
                state.digests,
            )
            saver.save(step, state.saved(), known_facts)
            saved = step

        def leave(step: int) -> Preempted:
            save(step)
            done = "saved" if saver.wait() else "could not save"
            return Preempted(f"asked to stop: {done} after step {step} of {steps}")

        for step in range(start.steps_done + 1, steps + 1):
            profiler.before(step)
            clock.begin()
            pulse.at(step, "data")
            taken = batches.take(step, stop)
            if taken is None:
                raise leave(step - 1)
            batch, made = taken
            pulse.at(step, "train")
            # Settings that do not fit show in the first step; a later ValueError is a fault.
            first = step == start.steps_done + 1
            try:
                with setup_mistakes() if first else nullcontext():
                    report = train_step(stage, state, batch, step, guard, stop, clock, made)
            except (RewindError, BadStepError):  # on all ranks; a save that is under way ends first
                saver.wait()
                raise
            stage.backend.synchronize()
            figures = report.figures | clock.end(batch.data_wait_s) | initial
            figures |= over_floor(figures, floors)
            initial = {}
            figures |= speed(stage, figures["step_s"], report.work)
            if tracker and (trace := profiler.after(step)):
                tracker.artifact(trace)
            if news := stragglers.seen(step, report.times):
                progress.say(news)
            pulse.at(step, "record, validate, save")
            stopping = report.stop
            if due(step) and not stopping:
                try:
                    figures |= judged(stage, state, stop)
                except StopSeenError:
                    stopping = True
            held_out = figures.get("validation_loss", math.nan)
            last = step == steps or gate_passed(stage, held_out)
            if tracker:
                tracker.step(step, figures)
                if stage.config.distill and due(step):
                    show_turns(folder, step, tracker)
            if not (last or stopping) and evaluation_due(stage, step):
                show_and_judge(stage, state, step, None, tracker, progress)
            progress.step(
                plan.stage, step, steps, loss=figures["loss"], frames_per_s=figures["frames_per_s"]
            )
            saving = step % trainer.checkpoint_every == 0 or last or stopping
            if (
                trainer.sdc_every
                and stage.world.size > 1
                and not state.zero
                and (saving or step % trainer.sdc_every == 0)
            ):
                check_replicas(step, state.tensors(), stage.world)
            if saving:
                save(step)
            if stopping:
                raise leave(step)
            if last:
                break
    if not saver.wait():
        raise StorageError(
            f"stage {plan.stage}: its last checkpoint could not be saved, as said above. Fix: make"
            " room and start it again; it goes on from the checkpoint before",
            saver.passing,
        )
    return step


def evaluation_due(stage: Stage, step: int) -> bool:
    """Return True at every n-th held-out loss, n being `trainer.evaluate_every`."""
    trainer = stage.config.trainer
    every = trainer.evaluate_every * trainer.validate_every
    return bool(every and trainer.evaluate and step % every == 0)


def show_and_judge(
    stage: Stage,
    state: TrainState,
    step: int,
    show_in: Path | None,
    tracker: Tracker | None,
    progress: Progress,
) -> None:
    """Roll out held-out clips and score them; `show_in`: the folder in which they are also shown as
    pictures, None during training."""
    sampled = roll_out(stage, state, progress)
    if sampled is None:
        return
    if show_in is not None:
        show_samples(stage, sampled, show_in, tracker, progress)
    if stage.config.trainer.evaluate:
        folder, shown = stage.plan.directory, show_in is not None
        evaluate_samples(stage, sampled, step, folder, tracker, progress, pictures=shown)


def judged(stage: Stage, state: TrainState, stop: StopRequest) -> dict[str, float]:
    """Return figures of held-out clips: losses, or where a student is distilled, which no loss
    judges, statistics of its rollouts."""
    return (rollout_statistics if stage.config.distill else held_out_loss)(stage, state, stop)


def first_rollouts(
    stage: Stage, state: TrainState, progress: Progress, stop: StopRequest
) -> dict[str, float]:
    """Return statistics of a student's rollouts before its first turn, named initial/....

    A student that is distilled from a poor start does not recover: with `distill.gate` stop, bounds
    that do not hold raise SetupError; with warn they are reported.
    """
    distill = stage.config.distill
    if distill is None:
        return {}
    try:
        figures = rollout_statistics(stage, state, stop)
    except StopSeenError:
        return {}  # the first step leaves
    if figures and (problem := gate_problem(figures, distill)):
        text = (
            f"the student's first rollouts do not look like the data: got {problem}. Fix: train the"
            " stage before this one longer, wider bounds, or distill.gate=warn"
        )
        if distill.gate == "stop":
            raise SetupError(text)
        progress.say(text)
    return {name.replace("rollout/", "initial/"): value for name, value in figures.items()}


def gate_passed(stage: Stage, validation_loss: float) -> bool:
    """Return True if the stage has reached its `until_loss` and ends before its last step. NaN: it
    was not measured."""
    return validation_loss <= stage.config.until_loss
