"""Take one optimizer step: gradients, one exchange of figures, the guard's decision, the update.

Gradients are summed over all processes; the objective's per-clip losses are divided by the global
batch here. So one process and any mesh take the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from data_shards.loading.load import Batch
from wm_train.boxes import local_tensor
from wm_train.config.kinds import OptimizerConfig
from wm_train.config.registry import builder
from wm_train.config.roles import CRITIC, STUDENT, Turn, turn_of, turns_of
from wm_train.config.schema import StageConfig
from wm_train.models.flops import mfu
from wm_train.objectives.alignment import align_critic_
from wm_train.objectives.clips import ObjectiveOutput
from wm_train.objectives.score_levels import mean_at_levels
from wm_train.optim.adamw import set_learning_rate
from wm_train.optim.schedule import learning_rate
from wm_train.resilience.guard import Guard
from wm_train.resilience.preemption import StopRequest
from wm_train.sampling.chunks import Rollouts
from wm_train.training.data import clips_of, micro_batches, role_turn
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState
from wm_train.training.step_clock import StepClock
from wm_train.world import World

DIRECTION = "direction/"  # names the channels of a gradient, which only their cosine is shown of


@dataclass(frozen=True)
class StepReport:
    """Hold the results of a step, the same on all ranks.

    figures: name -> value for the record; work: of the step (`Stage.work`), summed over ranks;
    times: (data wait, own work) of the step before, per rank; stop: some rank got a stop signal.
    """

    figures: dict[str, float]
    work: dict[str, float]
    times: Sequence[Sequence[float]]
    stop: bool


def train_step(
    stage: Stage,
    state: TrainState,
    batch: Batch,
    step: int,
    guard: Guard,
    stop: StopRequest,
    clock: StepClock,
    made: Sequence[Rollouts] | None = None,
) -> StepReport:
    """Take step `step` (from 1) on one global batch: the turn of one network, which alone gets
    gradients and changes. made: rollouts of each micro-batch, where they were made ahead."""
    config = stage.config
    turn = turn_of(config.turns, step - 1)
    active, optimizer = state.of(turn.role), optimizer_of(config, turn.role)
    lr = learning_rate(optimizer, turn.index, turns_of(config.turns, turn.role, config.steps))
    set_learning_rate(active.optimizer, lr)
    for role in (STUDENT, *state.roles):  # so that one network's gradients are held at a time
        state.of(role).optimizer.zero_grad(set_to_none=True)
    left_out = guard.leaves_out(step)

    sums = {"loss": 0.0} if left_out else gradients(stage, state, batch, turn, made)
    work = {name: 0.0 if left_out else amount for name, amount in stage.work(batch, turn).items()}
    squares = 0.0 if left_out else squared_norm(active, stage.world)
    waited, worked = clock.last
    mine = {"waited": waited, "worked": worked, "squares": squares}
    mine |= {"data_wait": batch.data_wait_s, "stop": float(stop.raised)}
    mine |= {f"sum/{name}": value for name, value in sums.items()}
    mine |= {f"work/{name}": value for name, value in work.items()}
    with clock.comm.on_host():
        ranks = stage.world.gather_named(mine)
    totals = {name: sum(values) for name, values in ranks.items()}
    figures = {name: totals[f"sum/{name}"] / config.global_batch for name in sums}
    work = {name: totals[f"work/{name}"] for name in work}
    figures = mean_at_levels(figures)
    channels = [figures.pop(name) for name in [*figures] if name.startswith(DIRECTION)]
    if channels and (cosine := clock.cosine(channels)) is not None:
        figures["direction_cosine"] = cosine
    norm = math.sqrt(totals["squares"]) if totals["squares"] >= 0 else math.nan

    of_ranks = list(zip(ranks["sum/loss"], ranks["squares"], strict=True))
    take = not left_out and guard.accepts(step, figures["loss"], of_ranks, turn.role)
    if take:
        if norm > optimizer.clip_norm:
            active.scale_gradients(optimizer.clip_norm / (norm + 1e-6))
        active.optimizer.step()
        active.update_average(optimizer.ema_decay, turn.index)
        after_turn(config, state, turn)
    if config.distill:
        # and under the role's name, as the losses of two networks are two curves
        own = {**figures, "lr": lr, "grad_norm": norm}
        figures |= {f"{turn.role}/{name}": value for name, value in own.items()}
    figures |= {
        "lr": lr,
        "grad_norm": norm,
        "skipped": float(not take),
        "data_wait_s": max(ranks["data_wait"]),
    }
    if config.data.pack:
        figures["packed_share"] = work["latent_frames"] / (config.global_batch * batch.frames)
    times = list(zip(ranks["waited"], ranks["worked"], strict=True))
    return StepReport(figures, work, times, totals["stop"] > 0)


def optimizer_of(config: StageConfig, role: str) -> OptimizerConfig:
    """Return the optimizer's configuration of a network that trains."""
    own = config.optimizer if role == STUDENT else config.roles[role].optimizer
    assert own is not None, "checked before the start: a role with turns has an optimizer"
    return own


@torch.no_grad()
def after_turn(config: StageConfig, state: TrainState, turn: Turn) -> None:
    """Draw the critic towards the student after a student's step, if configured (IDA)."""
    if config.distill and config.distill.ida < 1 and turn.role == STUDENT:
        critic, student = state.of(CRITIC).weights(), state.weights()
        pairs = [(local_tensor(critic[name]), local_tensor(student[name])) for name in critic]
        align_critic_([mine for mine, _ in pairs], [own for _, own in pairs], config.distill.ida)


def losses_of(
    stage: Stage, state: TrainState, batch: Batch, turn: Turn, made: Rollouts | None
) -> ObjectiveOutput:
    """Return the objective's losses of these clips; one of several networks gets them all."""
    config, clips = stage.config.objective, clips_of(stage, batch)
    objective: Callable[..., ObjectiveOutput] = builder(config)
    if config.several_networks():
        return objective(state.networks(), clips, config, role_turn(stage, batch, turn, made))
    return objective(state.network, clips, config)


def gradients(
    stage: Stage,
    state: TrainState,
    batch: Batch,
    turn: Turn,
    made: Sequence[Rollouts] | None = None,
) -> dict[str, float]:
    """Add the gradients of this rank's clips to the network whose turn it is; return the sums of
    loss and metrics over them.

    A clip split over P ranks contributes 1/P on each.
    """
    measured = add_gradients(stage, state, batch, turn, made)
    # One transfer a step, as each waits for the device; fp64 sums on the host, as some devices
    # have no fp64.
    rows = torch.stack(list(measured.values())).cpu().tolist()
    size = stage.mesh.sequence_size
    return {name: sum(row) / size for name, row in zip(measured, rows, strict=True)}


def add_gradients(
    stage: Stage,
    state: TrainState,
    batch: Batch,
    turn: Turn,
    made: Sequence[Rollouts] | None = None,
) -> dict[str, torch.Tensor]:
    """Add the gradients of this rank's clips to the network whose turn it is; return loss and
    metrics of each, fp32 [b] on the device."""
    active, clips = state.of(turn.role), stage.config.global_batch
    columns: list[torch.Tensor] = []  # [metrics, b] of each micro-batch
    names: list[str] = []
    parts = list(micro_batches(stage, batch))
    every: Sequence[Rollouts | None] = made or [None] * len(parts)
    for part, clips_made in zip(parts, every, strict=True):
        with kept_activations(stage):
            output = losses_of(stage, state, part, turn, clips_made)  # loss [b]
            if output.pieces is not None:
                active.backward_pieces(output.pieces, output.count, 1 / clips)
        if output.pieces is None:
            active.backward(output.loss.sum() / clips, last=part is parts[-1])
        metrics = {"loss": output.loss, **output.metrics}
        if output.direction is not None:
            metrics |= {f"{DIRECTION}{c}": x for c, x in enumerate(output.direction.unbind(1))}
        names = list(metrics)
        columns.append(torch.stack([value.detach().float() for value in metrics.values()]))
    return dict(zip(names, torch.cat(columns, dim=1), strict=True))


def kept_activations(stage: Stage) -> AbstractContextManager[object]:
    """Return a context that keeps activations on the host until the backward pass, if
    configured."""
    if not stage.config.parallel.offload_activations:
        return nullcontext()
    device = stage.backend.device.type
    return torch.autograd.graph.save_on_cpu(pin_memory=device != "cpu", device_type=device)


def squared_norm(state: TrainState, world: World) -> float:
    """Return this rank's share of the squared gradient norm; replicated tensors count once. Summed
    on the host in fp64."""
    held = [g.float() for g in state.gradients(world.rank) if g.numel()]
    norms = torch.stack(torch._foreach_norm(held)).cpu().tolist() if held else []
    return float(sum(norm**2 for norm in norms))


def speed(stage: Stage, seconds: float, work: dict[str, float]) -> dict[str, float]:
    """Return the throughput of a step that did this work over all ranks, and this rank's memory."""
    peak = stage.backend.peak_flops
    share = {"mfu": mfu(work["flops"], seconds, stage.world.size, peak)} if peak else {}
    return {
        "frames_per_s": work["frames"] / seconds,
        "tokens_per_s": work["tokens"] / seconds,
        "model_tflops_per_s": work["flops"] / seconds / 1e12,
        **share,
        **{f"memory_{name}_bytes": value for name, value in stage.backend.memory().items()},
    }
