"""Take one optimizer step: gradients, one exchange of figures, the guard's decision, the update.

Gradients are summed over all processes; the objective's per-clip losses are divided by the global
batch here. So one process and any mesh take the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from data_shards.loading.load import Batch
from wm_train.config.registry import builder
from wm_train.models.flops import mfu
from wm_train.optim.adamw import set_learning_rate
from wm_train.optim.schedule import learning_rate
from wm_train.resilience.guard import Guard
from wm_train.resilience.preemption import StopRequest
from wm_train.training.data import clips_of, micro_batches
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState
from wm_train.training.step_clock import StepClock
from wm_train.world import World


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
) -> StepReport:
    """Take step `step` (from 1) on one global batch."""
    config = stage.config
    lr = learning_rate(config.optimizer, step - 1, config.steps)
    set_learning_rate(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    left_out = guard.leaves_out(step)

    sums = {"loss": 0.0} if left_out else gradients(stage, state, batch)
    work = {name: 0.0 if left_out else amount for name, amount in stage.work(batch).items()}
    squares = 0.0 if left_out else squared_norm(state, stage.world)
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
    norm = math.sqrt(totals["squares"]) if totals["squares"] >= 0 else math.nan

    of_ranks = list(zip(ranks["sum/loss"], ranks["squares"], strict=True))
    take = not left_out and guard.accepts(step, figures["loss"], of_ranks)
    if take:
        if norm > config.optimizer.clip_norm:
            state.scale_gradients(config.optimizer.clip_norm / (norm + 1e-6))
        state.optimizer.step()
        state.update_average(config.optimizer.ema_decay, step - 1)
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


def gradients(stage: Stage, state: TrainState, batch: Batch) -> dict[str, float]:
    """Add the gradients of this rank's clips; return the sums of loss and metrics over them.

    A clip split over P ranks contributes 1/P on each.
    """
    objective, config = builder(stage.config.objective), stage.config.objective
    columns: list[torch.Tensor] = []  # [metrics, b] of each micro-batch
    names: list[str] = []
    parts = list(micro_batches(stage, batch))
    for part in parts:
        with kept_activations(stage):
            output = objective(state.network, clips_of(stage, part), config)  # loss [b]
        state.backward(output.loss.sum() / stage.config.global_batch, last=part is parts[-1])
        metrics = {"loss": output.loss, **output.metrics}
        names = list(metrics)
        columns.append(torch.stack([value.detach().float() for value in metrics.values()]))
    # One transfer a step, as each waits for the device; fp64 sums on the host, as some devices
    # have no fp64.
    rows = torch.cat(columns, dim=1).cpu().tolist()
    size = stage.mesh.sequence_size
    return {name: sum(row) / size for name, row in zip(names, rows, strict=True)}


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
