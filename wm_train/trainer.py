"""The loop: batch -> objective -> backward -> guard -> step -> record -> checkpoint.

Gradients are summed over all processes; the objective's per-clip losses are divided by the global batch here. So one process and any mesh
take the same step (design §3, §9).
"""

from __future__ import annotations

import math
import time

import torch

from data_shards.load import Batch
from data_shards.schema import DataError
from wm_train.backends import Backend
from wm_train.config import RunConfig
from wm_train.curriculum import stage_directory
from wm_train.manifest import CheckpointError
from wm_train.objectives import OBJECTIVES
from wm_train.optim.adamw import set_learning_rate
from wm_train.optim.ema import ema_update
from wm_train.optim.schedule import learning_rate
from wm_train.progress import Progress
from wm_train.stage import Stage, conditions_of, on_device, open_loader, open_stage, sequence_of
from wm_train.state import SetupError, TrainState, build_state, restore, save
from wm_train.tensor_parts import is_first_copy, local_tensor
from wm_train.tracking import Tracker
from wm_train.validation import show_samples
from wm_train.world import World


def train_stage(run: RunConfig, backend: Backend, world: World, progress: Progress) -> None:
    """Train the stage named `run.stage` from its newest checkpoint to its last step, then roll out samples.

    Errors: SetupError for what the user must change, before the first step; FloatingPointError when a step is not finite.
    """
    try:
        stage = open_stage(run, backend, world)
        state = build_state(run, stage.mesh.fsdp, backend.device)
        first = restore(run, state, stage.dataset.info.fingerprint, world, progress.say)
    except (DataError, CheckpointError) as error:
        raise SetupError(str(error)) from error
    folder = stage_directory(run, run.stage)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run, run.stage, folder, first, progress.say) if world.rank == 0 else None
    outcome = "FAILED"
    try:
        run_steps(stage, state, first, tracker, progress)
        show_samples(stage, state, folder, tracker, progress)
        outcome = "FINISHED"
    finally:
        if tracker:
            tracker.close(outcome)


def run_steps(stage: Stage, state: TrainState, first: int, tracker: Tracker | None, progress: Progress) -> None:
    """Steps first+1 … config.steps, each recorded, with a checkpoint every `trainer.checkpoint_every` and at the end."""
    steps, every = stage.config.steps, stage.run.trainer.checkpoint_every
    if first >= steps:
        progress.say(f"stage {stage.run.stage} already has all of its {steps} steps")
        return
    with open_loader(stage, "train", stage.config.global_batch, first) as loader:
        for step in range(first, steps):
            started = time.perf_counter()
            figures = train_step(stage, state, on_device(stage, next(loader)), step)
            stage.backend.synchronize()
            figures |= speed(stage, time.perf_counter() - started)
            if tracker:
                tracker.step(step + 1, figures)
            progress.step(stage.run.stage, step + 1, steps, loss=figures["loss"], frames_per_s=figures["frames_per_s"])
            if (step + 1) % every == 0 or step + 1 == steps:
                save(stage.run, state, step + 1, stage.dataset.info.fingerprint, stage.world)


def train_step(stage: Stage, state: TrainState, batch: Batch, step: int) -> dict[str, float]:
    """One optimizer step on one global batch; returns its figures, the same on every process."""
    config = stage.config
    lr = learning_rate(config.optimizer, step, config.steps)
    set_learning_rate(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)

    sequence, conditions = sequence_of(stage, batch), conditions_of(stage, batch)
    objective = OBJECTIVES[config.objective.name]
    output = objective(state.model, batch, stage.noise, config.objective, sequence, conditions)  # loss [B / data size], one per clip
    (output.loss.sum() / config.global_batch).backward()

    named = {"loss": output.loss, **output.metrics}
    sums = {name: float(value.detach().double().sum()) / stage.mesh.sequence_size for name, value in named.items()}
    everyone = stage.world.gather_numbers([*sums.values(), squared_norm(state, stage.world), batch.data_wait_s])
    totals = everyone.sum(dim=0).tolist()
    figures = {name: total / config.global_batch for name, total in zip(sums, totals, strict=False)}
    norm = math.sqrt(totals[-2]) if totals[-2] >= 0 else math.nan

    check_finite(everyone[:, 0], everyone[:, -2], step)
    clip_gradients(state, norm, config.optimizer.clip_norm)
    state.optimizer.step()
    if state.ema:
        ema_update(state.ema, state.model, config.optimizer.ema_decay, step)
    return {**figures, "lr": lr, "grad_norm": norm, "data_wait_s": float(everyone[:, -1].max())}


def squared_norm(state: TrainState, world: World) -> float:
    """Sum of squares of the gradients this process holds and nobody else counts."""
    held = [local_tensor(p.grad) for p in state.model.parameters() if p.grad is not None and is_first_copy(p, world.rank)]
    norms = torch._foreach_norm([g.float() for g in held if g.numel()])
    return float(torch.stack(norms).double().square().sum()) if norms else 0.0


def check_finite(losses: torch.Tensor, squares: torch.Tensor, step: int) -> None:
    """Stop on every process, with the parameters untouched, when any loss or gradient is not finite.

    One NaN would poison every gradient in clipping and both moments of AdamW after it.
    """
    bad = [rank for rank in range(len(losses)) if not (math.isfinite(losses[rank]) and math.isfinite(squares[rank]))]
    if bad:
        raise FloatingPointError(
            f"step {step + 1}: got loss {losses.tolist()} and squared gradient norms {squares.tolist()} by rank, expected finite numbers "
            f"(ranks {bad}). Parameters are as after step {step}. Fix: lower recipe.stages.<stage>.optimizer.lr, or look at that batch"
        )


@torch.no_grad()
def clip_gradients(state: TrainState, norm: float, limit: float) -> None:
    """Scale all gradients by limit / norm when their global norm exceeds `limit`."""
    if norm > limit:
        gradients = [local_tensor(p.grad) for p in state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


def speed(stage: Stage, seconds: float) -> dict[str, float]:
    """Throughput of a step over all processes, and this process's memory."""
    info, config = stage.dataset.info, stage.config
    tokens = config.global_batch * stage.latent_frames * info.latent_height * info.latent_width
    return {
        "step_s": seconds,
        "frames_per_s": config.global_batch * config.frames / seconds,
        "tokens_per_s": tokens / seconds,
        **{f"memory_{name}_bytes": value for name, value in stage.backend.memory().items()},
    }
