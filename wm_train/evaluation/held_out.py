"""Measure the held-out loss on a fixed grid of noise levels with fixed noise, so that curves of
different runs and meshes compare."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from data_shards.loading.load import Batch
from wm_train.config.registry import builder
from wm_train.noise import VALIDATION, NoiseKey
from wm_train.resilience.preemption import StopRequest, StopSeenError
from wm_train.training.data import batch_parts, clips_of, on_device, open_loader
from wm_train.training.stage import Stage
from wm_train.training.state import EvaluationState, TrainState


@torch.no_grad()
def held_out_loss(
    stage: Stage, state: TrainState | EvaluationState, stop: StopRequest | None = None
) -> dict[str, float]:
    """Return the mean loss of the averaged weights over the first `trainer.validation_clips`
    held-out clips: `validation_loss`, and per noise level of the objective's grid.

    Raises StopSeenError on all processes when `stop` was raised on one.
    """
    stop = stop or StopRequest()
    objective = stage.config.objective
    wanted, batch = fetch_held_out(stage, stage.config.trainer.validation_clips, stop)
    if batch is None:
        return {}
    parts = parts_of(stage, wanted)
    sums, levels = [], objective.held_out_levels()
    configs = [objective.held_out(sigma) for sigma in levels] or [objective]
    with state.averaged(), stop.watched(state.model, stage.world):
        for config in configs:
            total = 0.0
            for part in batch_parts(batch, parts):
                clips = replace(clips_of(stage, part), key=NoiseKey(stage.plan.seed, VALIDATION))
                output = builder(config)(state.model, clips, config)
                rows = zip(output.loss.tolist(), part.draws.tolist(), strict=True)
                # Rows beyond `wanted` only fill up the last rank's share.
                counted = sum(loss for loss, draw in rows if draw < wanted)
                total += counted / stage.mesh.sequence_size
            sums.append(total)
    means = (stage.world.gather_numbers(sums).sum(dim=0) / wanted).tolist()
    by_level = {f"validation_loss_sigma_{s}": m for s, m in zip(levels, means, strict=bool(levels))}
    return {"validation_loss": sum(means) / len(means), **by_level}


def fetch_held_out(
    stage: Stage, most: int, stop: StopRequest | None = None
) -> tuple[int, Batch | None]:
    """Return how many held-out clips there are, at most `most`, and this rank's rows and frames of
    them; None if there are none. Rows beyond them only fill up the last rank's share.

    Raises StopSeenError on all processes when `stop` was raised on one.
    """
    wanted = min(most, len(stage.dataset.clips("validation")))
    if not wanted:
        return 0, None
    with open_loader(stage, "validation", padded(stage, wanted)) as loader:
        fetched = loader.next_unless(stop) if stop else next(loader)
    if fetched is None:
        raise StopSeenError
    return wanted, on_device(stage, fetched)


def parts_of(stage: Stage, wanted: int) -> int:
    """Return into how many parts held-out clips are cut: no more at once than in training."""
    return math.ceil(padded(stage, wanted) / stage.config.global_batch)


def padded(stage: Stage, wanted: int) -> int:
    """Return the next number of clips that divides evenly over the data ranks."""
    return -(-wanted // stage.mesh.data_size) * stage.mesh.data_size
