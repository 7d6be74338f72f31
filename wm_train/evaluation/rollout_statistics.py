"""Judge a distilled student by its rollouts: its losses do not show progress, as a normalised
gradient keeps its size.

Held-out clips are rolled out as the stage's sampler does, with the averaged weights and fixed
noise, and compared with the data: too strong or too weak a contrast, still or jumping pictures,
drift along the clip, one answer for all seeds. The critic is compared with the teacher: its loss on
rollouts over the teacher's on data, noise level by noise level, is 1 where both are at their floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.loading.load import Batch
from parallel.sequence import SequenceShard
from wm_train.boxes import is_first_copy, local_tensor
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.config.roles import CRITIC, TEACHER, DistillConfig
from wm_train.evaluation.held_out import fetch_held_out
from wm_train.evaluation.samples import decode, levels_of, uncompiled, whole_clips
from wm_train.noise import VALIDATION, VALIDATION_AGAIN, NoiseKey, normal
from wm_train.objectives.score_difference import critic_loss
from wm_train.objectives.score_levels import LOSS_AT, MIDDLES
from wm_train.objectives.student_rollouts import teachers
from wm_train.resilience.preemption import StopRequest, StopSeenError
from wm_train.sampling.experts import Model, by_frame, experts_of
from wm_train.sampling.levels import first_frames
from wm_train.sampling.sample import SampleStart
from wm_train.training.data import conditions_of, first_latents, sequence_of
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState
from wm_train.world import World

GRID = MIDDLES  # noise levels of the critic's loss
# of recorded figures: the teacher's loss on data, a turn's critic loss over it, and a validation's
FLOOR, TURN_OVER_FLOOR, OVER_FLOOR = "floor_sigma_", "over_floor_sigma_", "critic_over_floor_sigma_"
DARKEST, BRIGHTEST = 2, 253  # luma of 8 bits that counts as clipped


@torch.no_grad()
def rollout_statistics(
    stage: Stage, state: TrainState, stop: StopRequest | None = None
) -> dict[str, float]:
    """Return figures of the first `trainer.validation_clips` held-out clips, equal on all ranks;
    none without such clips.

    Raises StopSeenError on all processes when `stop` was raised on one.
    """
    stop = stop or StopRequest()
    wanted, batch = fetch_held_out(stage, stage.config.trainer.validation_clips, stop)
    if batch is None:
        return {}
    sequence, conditions = sequence_of(stage, batch), conditions_of(stage, batch)
    sampler, rollouts = stage.config.sampler, []
    with state.averaged(), stop.watched(state.model, stage.world), uncompiled(stage):
        for name in (VALIDATION, VALIDATION_AGAIN):
            start = SampleStart(
                experts_of(state.model),
                first_latents(stage, batch),
                conditions,
                levels_of(stage.config),
                NoiseKey(stage.plan.seed, name),
                batch.draws,
                sequence,
                stage.kernels,
            )
            rollouts.append(builder(sampler)(start, sampler))
    made, again, truth = (
        whole_clips(stage, x)[:wanted] for x in (rollouts[0], rollouts[1], batch.latents)
    )
    figures = clip_statistics(made, again, truth, sequence.layout.chunk_starts)
    if stage.config.trainer.samples:  # else nothing is decoded here, for want of a codec
        shares = None
        if not stage.world.rank:
            shares = [clipped_luma([decode(stage, clip) for clip in x]) for x in (made, truth)]
        luma = stage.world.from_first(shares)
        figures |= {"clipped_luma": luma[0], "clipped_luma_data": luma[1]}
    if state.roles:
        on_made = scores(stage, state, CRITIC, rollouts[0], batch, conditions)
        floors = scores(stage, state, TEACHER, batch.latents, batch, conditions)
        for sigma, fake, floor in zip(GRID, on_made, floors, strict=True):
            figures |= {f"{OVER_FLOOR}{sigma}": fake / floor, f"{FLOOR}{sigma}": floor}
    if state.ema:
        figures["average_distance"] = average_distance(state, stage.world)
    return {f"rollout/{name}": value for name, value in figures.items()}


def clipped_luma(videos: Sequence[NDArray[np.uint8]]) -> float:
    """Return the share of pixels of videos [F, H, W, 3] that are black or white: burnt pictures."""
    lumas = [video @ np.array([0.2126, 0.7152, 0.0722]) for video in videos]
    return float(np.mean([((y <= DARKEST) | (y >= BRIGHTEST)).mean() for y in lumas]))


@torch.no_grad()
def critic_floors(stage: Stage, state: TrainState, stop: StopRequest) -> dict[float, float]:
    """Return noise level -> the teacher's loss on held-out data, which a critic's loss on rollouts
    like the data cannot pass by much; none without a critic or such clips, or if a stop is seen."""
    if not state.roles:
        return {}
    try:
        _, batch = fetch_held_out(stage, stage.config.trainer.validation_clips, stop)
    except StopSeenError:
        return {}  # the first step leaves
    if batch is None:
        return {}
    with uncompiled(stage):
        losses = scores(stage, state, TEACHER, batch.latents, batch, conditions_of(stage, batch))
    return dict(zip(GRID, losses, strict=True))


def over_floor(figures: Mapping[str, float], floors: Mapping[float, float]) -> dict[str, float]:
    """Return the critic's loss of a turn by noise level over the floor there: what rises where it
    lags behind the student. None of a turn of another network."""
    return {
        f"{CRITIC}/{TURN_OVER_FLOOR}{sigma}": figures[f"{CRITIC}/{LOSS_AT}{sigma}"] / floor
        for sigma, floor in floors.items()
        if f"{CRITIC}/{LOSS_AT}{sigma}" in figures
    }


def scores(
    stage: Stage, state: TrainState, role: str, clean: Tensor, batch: Batch, conditions: Conditions
) -> list[float]:
    """Return the loss of one score network on these local frames at each level of GRID."""
    sequence = sequence_of(stage, batch, stage.config.roles[role].chunk_frames)
    networks = state.networks()
    network: Model = networks[role]
    if role == TEACHER and stage.config.distill:
        network = by_frame(teachers(networks, stage.config.distill))
    return level_losses(stage, network, clean, batch.draws, conditions, sequence)


def clip_statistics(
    made: Tensor, again: Tensor, truth: Tensor, chunk_starts: tuple[int, ...]
) -> dict[str, float]:
    """Compare rollouts of one noise with those of another and with the data, all [B, T, C, h, w];
    the given first frame does not count.

    std_ratio, motion_ratio: over the data's, geometric means over channels; motion is the
    difference of neighbouring frames. mean_shift: of channel means, in the data's deviations.
    drift: std_ratio of the last chunk over that of the first. diversity: rms difference of two
    noises, over the root of 2 and the data's deviation: 1 for answers as wide as the data.
    """
    last, second = chunk_starts[-1], [*chunk_starts[1:], truth.shape[1]][0]
    ends = [
        _ratio(_std(made[:, part]), _std(truth[:, part]))
        for part in (slice(1, second), slice(last, None))
    ]
    spread, moved = _std(truth[:, 1:]), truth.diff(dim=1)
    shift = (_mean(made[:, 1:]) - _mean(truth[:, 1:])) / spread
    apart = (made - again)[:, 1:].square().mean(dim=(0, 1, 3, 4)).sqrt() / (2**0.5 * spread)
    return {
        "std_ratio": _ratio(_std(made[:, 1:]), spread),
        "mean_shift": float(shift.square().mean().sqrt()),
        "motion_ratio": _ratio(_rms(made.diff(dim=1)), _rms(moved)),
        "drift": ends[1] / ends[0],
        "diversity": float(apart.square().mean().sqrt()),
    }


def _mean(x: Tensor) -> Tensor:
    return x.double().mean(dim=(0, 1, 3, 4))


def _std(x: Tensor) -> Tensor:
    return x.double().transpose(0, 2).flatten(1).std(dim=1).clamp(1e-12)


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean(dim=(0, 1, 3, 4)).sqrt().clamp(1e-12)


def _ratio(a: Tensor, b: Tensor) -> float:
    return float((a.log() - b.log()).mean().exp())


def level_losses(
    stage: Stage,
    network: Model,
    clean: Tensor,
    draws: Tensor,
    conditions: Conditions,
    sequence: SequenceShard,
) -> list[float]:
    """Return a network's flow-matching loss on these local frames at each level of GRID, a mean
    over all processes' clips."""
    frames = (sequence.frames.start, sequence.frames.stop)
    noise = normal(NoiseKey(stage.plan.seed, VALIDATION), "critic", draws, frames, clean.shape[2:])
    free = ~first_frames(sequence.layout, sequence.frames, clean.device)

    def velocity(noisy: Tensor, level: Tensor) -> Tensor:
        out: Tensor = network(noisy, level, conditions, sequence)
        return out

    losses = []
    for sigma in GRID:
        level = torch.where(free, sigma, 0.0).expand(clean.shape[:2])
        losses.append(float(critic_loss(velocity, clean, noise, level, sequence.mean).sum()))
    total = stage.world.gather_numbers([*losses, float(len(draws))]).sum(dim=0)
    return (total[:-1] / total[-1]).tolist()


def average_distance(state: TrainState, world: World) -> float:
    """Return the distance of the weights from their average, over their norm."""
    weights, sums = dict(state.model.named_parameters()), [0.0, 0.0]
    for name, average in state.ema.items():
        if is_first_copy(weights[name], world.rank):
            own = local_tensor(weights[name]).detach().float()
            sums[0] += float((own - local_tensor(average).float()).square().sum())
            sums[1] += float(own.square().sum())
    apart, size = world.gather_numbers(sums).sum(dim=0).tolist()
    return float((apart / max(size, 1e-30)) ** 0.5)


def gate_problem(figures: dict[str, float], distill: DistillConfig) -> str:
    """Return which of the initial student's figures are outside their bounds, as text; "" where
    none is."""
    bounds = {"std_ratio": distill.gate_std, "motion_ratio": distill.gate_motion}
    wrong = [
        f"{name} {figures[f'rollout/{name}']:.3g}, expected {low:g} to {high:g} (key"
        f" distill.gate_{name.removesuffix('_ratio')})"
        for name, (low, high) in bounds.items()
        if not low <= figures[f"rollout/{name}"] <= high
    ]
    return "; ".join(wrong)
