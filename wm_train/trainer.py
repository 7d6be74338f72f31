"""The loop: batch -> objective -> backward -> guard -> step -> record -> checkpoint.

Gradients are summed over all processes; the objective's per-clip losses are divided by the global
batch here. So one process and any mesh take the same step (design §3, §9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

from data_shards.loading.load import Batch
from data_shards.schema import DataError
from wm_train.backends import Backend
from wm_train.checkpoint.manifest import CheckpointError
from wm_train.checkpoint.saver import Saver
from wm_train.config.curriculum import checkpoints_of, stage_directory, stage_run
from wm_train.config.schema import RunConfig
from wm_train.console import Progress, complain
from wm_train.evaluation.held_out import held_out_loss
from wm_train.evaluation.samples import show_samples
from wm_train.models.flops import mfu
from wm_train.objectives import OBJECTIVES
from wm_train.optim.adamw import set_learning_rate
from wm_train.optim.schedule import learning_rate
from wm_train.resilience.guard import Guard, RewindError
from wm_train.resilience.heartbeat import Heartbeat, missing_ranks, silent_ranks
from wm_train.resilience.preemption import Preempted, StopRequest
from wm_train.resilience.replicas import check_replicas
from wm_train.resilience.stragglers import Stragglers
from wm_train.tracking.profiling import StepProfiler, steps_to_profile
from wm_train.tracking.tracker import Tracker
from wm_train.training.resume import Start, restore
from wm_train.training.rewind import rewind
from wm_train.training.stage import (
    Stage,
    conditions_of,
    micro_batches,
    on_device,
    open_loader,
    open_stage,
    sequence_of,
)
from wm_train.training.state import SetupError, TrainState, build_state, facts
from wm_train.training.step_clock import StepClock
from wm_train.world import World


def train_stage(
    run: RunConfig, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Train the stage named `run.stage` from its newest checkpoint to its last step, then roll out
    samples.

    Errors: SetupError for what the user must change, until the first step is taken; DataError for
    data that is damaged or cannot be read; BadStepError from the guard; Preempted after `stop` was
    raised on any process and the state was saved.
    """
    run = stage_run(run, run.stage)
    with setup_mistakes():
        stage = open_stage(run, backend, world)
        state = build_state(run, stage.mesh.fsdp, backend.device)
        start = restore(run, state, stage.data_fingerprint, world, progress.say)
    folder = stage_directory(run, run.stage)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = (
        Tracker(run, run.stage, folder, start.steps_done, progress.say) if world.rank == 0 else None
    )
    outcome = "FAILED"
    try:
        progress.mark("model and data")
        with Heartbeat(folder / "heartbeats", world.rank) as pulse:
            clock, done = StepClock(stage, state), False
            while not done:
                try:
                    run_steps(stage, state, start, tracker, progress, stop, pulse, clock)
                    done = True
                except RewindError as asked:
                    start = rewind(run, state, asked, world, progress.say)
                    if tracker:
                        tracker.rewind(start.steps_done)
            pulse.at(stage.config.steps, "samples")
            show_samples(stage, state, folder, tracker, progress)
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


@contextmanager
def setup_mistakes() -> Iterator[None]:
    """Raise any ValueError of this block as SetupError, so that no restart repeats it.

    DataError stays: the worker decides by what it says.
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
) -> None:
    """The steps that are left, each recorded, with a checkpoint every `trainer.checkpoint_every`,
    at the end and when asked to stop.

    Errors: BadStepError and RewindError from the guard, CorruptionError when replicas differ,
    Preempted.
    """
    run, steps = stage.run, stage.config.steps
    if start.steps_done >= steps or gate_passed(stage, start.validation_loss):
        progress.say(
            f"stage {run.stage} has ended already, after {start.steps_done} of {steps} steps"
        )
        return
    folder = stage_directory(run, run.stage)
    guard, stragglers = Guard(run.trainer, start.guard), Stragglers(run.trainer.straggler_factor)
    profiler = StepProfiler(
        steps_to_profile(run.trainer.profile) if tracker else range(0),
        folder / "profile",
        stage.backend.profiler,
    )
    lost = partial(
        silent_ranks, folder / "heartbeats", stage.world.size, run.backend.collective_timeout_s
    )
    saver = Saver(
        checkpoints_of(run, run.stage), run.stage, run.trainer, stage.world, progress.say, lost
    )
    with open_loader(
        stage, "train", stage.config.global_batch, start.steps_done, start.quarantined, progress.say
    ) as loader:
        if loader.packing:
            progress.say(loader.packing)
        for step in range(start.steps_done + 1, steps + 1):
            profiler.before(step)
            clock.begin()
            pulse.at(step, "data")
            batch = on_device(stage, next(loader))
            pulse.at(step, "train")
            # Settings that do not fit show in the first step; a later ValueError is a fault.
            first = step == start.steps_done + 1
            try:
                with setup_mistakes() if first else nullcontext():
                    figures, work, times = train_step(stage, state, batch, step, guard, stop, clock)
            except RewindError:
                saver.wait()
                raise
            stage.backend.synchronize()
            figures |= clock.end(batch.data_wait_s)
            figures |= speed(stage, figures["step_s"], work)
            if tracker and (trace := profiler.after(step)):
                tracker.artifact(trace)
            if news := stragglers.seen(step, times):
                progress.say(news)
            stopping = figures.pop("stop") > 0
            pulse.at(step, "record, validate, save")
            if step == steps or (
                run.trainer.validate_every and step % run.trainer.validate_every == 0
            ):
                figures |= held_out_loss(stage, state)
            held_out = figures.get("validation_loss", math.nan)
            last = step == steps or gate_passed(stage, held_out)
            if tracker:
                tracker.step(step, figures)
            progress.step(
                run.stage, step, steps, loss=figures["loss"], frames_per_s=figures["frames_per_s"]
            )
            saving = step % run.trainer.checkpoint_every == 0 or last or stopping
            if (
                run.trainer.sdc_every
                and stage.world.size > 1
                and not state.zero
                and (saving or step % run.trainer.sdc_every == 0)
            ):
                check_replicas(step, state.tensors(), stage.world)
            if saving:
                known = held_out if math.isfinite(held_out) else None
                known_facts = facts(
                    run,
                    stage.data_fingerprint,
                    stage.world,
                    guard.memory(),
                    known,
                    loader.quarantined,
                )
                saver.save(step, state.saved(), known_facts)
            if last:
                break
            if stopping:
                saved = saver.wait()
                raise Preempted(
                    f"asked to stop: {'saved' if saved else 'could not save'} after step {step} of"
                    f" {steps}"
                )
    if not saver.wait():
        raise CheckpointError(
            f"stage {run.stage}: its last checkpoint could not be saved. Fix: make room and start"
            " it again"
        )


def gate_passed(stage: Stage, validation_loss: float) -> bool:
    """Whether the stage has reached its `until_loss` and ends before its last step. NaN: it was not
    measured."""
    return validation_loss <= stage.config.until_loss


def train_step(
    stage: Stage,
    state: TrainState,
    batch: Batch,
    step: int,
    guard: Guard,
    stop: StopRequest,
    clock: StepClock,
) -> tuple[dict[str, float], dict[str, float], list[list[float]]]:
    """Step `step` (from 1) on one global batch; returns its figures, the work it did (`Stage.work`)
    and every process's times of the step before, all the same on all."""
    config = stage.config
    lr = learning_rate(config.optimizer, step - 1, config.steps)
    set_learning_rate(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    left_out = guard.leaves_out(step)

    sums = {"loss": 0.0} if left_out else gradients(stage, state, batch)
    work = {name: 0.0 if left_out else amount for name, amount in stage.work(batch).items()}
    squares = 0.0 if left_out else squared_norm(state, stage.world)
    mine = [
        *clock.last,
        *sums.values(),
        *work.values(),
        squares,
        batch.data_wait_s,
        float(stop.raised),
    ]
    with clock.comm.on_host():
        times, everyone = stage.world.gather_numbers(mine).tensor_split([len(clock.last)], dim=1)
    totals = everyone.sum(dim=0).tolist()
    figures = {name: total / config.global_batch for name, total in zip(sums, totals, strict=False)}
    work = dict(zip(work, totals[len(sums) :], strict=False))
    norm = math.sqrt(totals[-3]) if totals[-3] >= 0 else math.nan

    take = not left_out and guard.accepts(
        step, figures["loss"], list(zip(*everyone[:, [0, -3]].T.tolist(), strict=True))
    )
    if take:
        if norm > config.optimizer.clip_norm:
            state.scale_gradients(config.optimizer.clip_norm / (norm + 1e-6))
        state.optimizer.step()
        state.update_average(config.optimizer.ema_decay, step - 1)
    figures |= {
        "lr": lr,
        "grad_norm": norm,
        "skipped": float(not take),
        "data_wait_s": float(everyone[:, -2].max()),
        "stop": totals[-1],
    }
    if stage.run.data.pack:
        figures["packed_share"] = work["latent_frames"] / (config.global_batch * batch.frames)
    return figures, work, times.tolist()


def gradients(stage: Stage, state: TrainState, batch: Batch) -> dict[str, float]:
    """Add the gradients of this process's clips; return the sums of loss and metrics over them.

    Of a clip that a sequence group of P processes shares, each counts 1/P.
    """
    objective, config = OBJECTIVES[stage.config.objective.name], stage.config.objective
    columns: list[torch.Tensor] = []  # [metrics, b] of each micro-batch
    names: list[str] = []
    parts = list(micro_batches(stage, batch))
    for part in parts:
        sequence, conditions = sequence_of(stage, part), conditions_of(stage, part)
        with kept_activations(stage):
            # loss [b], one per clip
            output = objective(state.network, part, stage.noise, config, sequence, conditions)
        state.backward(output.loss.sum() / stage.config.global_batch, last=part is parts[-1])
        metrics = {"loss": output.loss, **output.metrics}
        names = list(metrics)
        columns.append(torch.stack([value.detach().float() for value in metrics.values()]))
    # One transfer a step, as each waits for the device; fp64 sums on the host, as NPUs lack them.
    rows = torch.cat(columns, dim=1).cpu().tolist()
    size = stage.mesh.sequence_size
    return {name: sum(row) / size for name, row in zip(names, rows, strict=True)}


def kept_activations(stage: Stage) -> AbstractContextManager[object]:
    """Where the activations that backward needs wait for it."""
    if not stage.run.parallel.offload_activations:
        return nullcontext()
    device = stage.backend.device.type
    return torch.autograd.graph.save_on_cpu(pin_memory=device != "cpu", device_type=device)


def squared_norm(state: TrainState, world: World) -> float:
    """Return the squared norm of the gradients this process counts, summed on the host in fp64."""
    held = [g.float() for g in state.gradients(world.rank) if g.numel()]
    norms = torch.stack(torch._foreach_norm(held)).cpu().tolist() if held else []
    return float(sum(norm**2 for norm in norms))


def speed(stage: Stage, seconds: float, work: dict[str, float]) -> dict[str, float]:
    """Throughput of a step that did this work over all processes, and this process's memory."""
    return {
        "frames_per_s": work["frames"] / seconds,
        "tokens_per_s": work["tokens"] / seconds,
        "model_tflops_per_s": work["flops"] / seconds / 1e12,
        **(
            {"mfu": mfu(work["flops"], seconds, stage.world.size, peak)}
            if (peak := stage.backend.peak_flops)
            else {}
        ),
        **{f"memory_{name}_bytes": value for name, value in stage.backend.memory().items()},
    }
