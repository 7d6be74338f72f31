"""Held-out loss on a fixed grid of noise levels with fixed noise, so that curves of different runs
and meshes compare."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from wm_train.config.schema import ObjectiveConfig
from wm_train.noise import VALIDATION, NoiseKey
from wm_train.objectives import OBJECTIVES
from wm_train.training.stage import (
    Stage,
    batch_parts,
    conditions_of,
    on_device,
    open_loader,
    sequence_of,
)
from wm_train.training.state import EvaluationState, TrainState

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def at_sigma(config: ObjectiveConfig, sigma: float) -> ObjectiveConfig:
    """The objective with every clip at one noise level, its first frame given and nothing
    dropped."""
    fixed = replace(
        config,
        sigma_mean=math.log(sigma / (1 - sigma)),
        sigma_std=0.0,
        flow_shift=1.0,
        sigma_min=0.0,
        sigma_max=1.0,
    )
    return replace(fixed, image_condition=1.0, camera_dropout=0.0, text_dropout=0.0)


def levels_of(config: ObjectiveConfig) -> tuple[float, ...]:
    """The levels of the grid that this objective trains, its lower end not counted; of a range
    between two of them the middle."""
    inside = tuple(sigma for sigma in SIGMAS if config.sigma_min < sigma <= config.sigma_max)
    return inside or ((config.sigma_min + config.sigma_max) / 2,)


@torch.no_grad()
def held_out_loss(stage: Stage, state: TrainState | EvaluationState) -> dict[str, float]:
    """Mean loss of the averaged weights over the first `trainer.validation_clips` held-out clips:
    `validation_loss`, and per sigma."""
    wanted = min(stage.run.trainer.validation_clips, len(stage.dataset.clips("validation")))
    if not wanted:
        return {}
    share = -(-wanted // stage.mesh.data_size)
    with open_loader(stage, "validation", share * stage.mesh.data_size) as loader:
        batch = on_device(stage, next(loader))
    parts = math.ceil(
        share * stage.mesh.data_size / stage.config.global_batch
    )  # no more clips at once than in training
    sums, levels = [], levels_of(stage.config.objective)
    with state.averaged():
        for sigma in levels:
            config, total = at_sigma(stage.config.objective, sigma), 0.0
            for part in batch_parts(batch, parts):
                objective = OBJECTIVES[config.name]
                output = objective(
                    state.model,
                    part,
                    NoiseKey(stage.run.seed, VALIDATION),
                    config,
                    sequence_of(stage, part),
                    conditions_of(stage, part),
                )
                rows = zip(output.loss.tolist(), part.draws.tolist(), strict=True)
                # the last row of an uneven share stands in for nobody
                counted = sum(loss for loss, draw in rows if draw < wanted)
                total += counted / stage.mesh.sequence_size
            sums.append(total)
    means = (stage.world.gather_numbers(sums).sum(dim=0) / wanted).tolist()
    return {
        "validation_loss": sum(means) / len(means),
        **{f"validation_loss_sigma_{s}": m for s, m in zip(levels, means, strict=True)},
    }
