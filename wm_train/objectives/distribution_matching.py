"""Train a few-step student by matching distributions on its own rollouts (DMD, Yin et al. 2024;
Self-Forcing; SANA-WM §3.1 stage 4 and §5.4).

Both kinds of turn begin with a rollout of the student up to an exit step that is drawn by the turn.
In a student's turn the score networks compare the clips at one noise level, and the difference is
the loss's gradient with respect to the student's clean predictions; it is passed on chunk by chunk
(`late_losses`). In a critic's turn the critic learns to denoise the clips, by flow matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from parallel.sequence import SequenceShard
from parallel.transpose import share_of, to_clips, to_frames
from wm_train.conditioning import Conditions
from wm_train.config.roles import CRITIC, STUDENT, TEACHER
from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, ObjectiveOutput, RoleTurn
from wm_train.objectives.config import DistributionMatchingConfig
from wm_train.objectives.flow_matching import drop_text
from wm_train.objectives.score_difference import (
    Velocity,
    critic_loss,
    guided_velocity,
    score_difference,
    scored_frames,
)
from wm_train.objectives.score_levels import at_the_clamp, score_sigma, scored_range, turn_choice
from wm_train.sampling.chunks import ChunkExit, late_losses, roll_out
from wm_train.sampling.levels import first_frames, sampling_levels


def distribution_matching(
    networks: Mapping[str, WorldModel],
    clips: Clips,
    config: DistributionMatchingConfig,
    turn: RoleTurn,
) -> ObjectiveOutput:
    """Return the losses of one turn of the student or the critic.

    Loss of a student's turn: half the mean square of its gradient g, a measure of distance only;
    its pieces carry the gradient. Metrics: exit, sigma, clamped (share of levels at an end of their
    range); in a student's turn gap, the relative difference of the score networks.
    """
    distill, student, key = turn.distill, networks[STUDENT], clips.key
    sequence, layout = turn.sequences[CRITIC], turn.sequences[STUDENT].layout
    exit_step = len(distill.levels)
    if distill.exit == "turn":
        name = f"exit/{turn.turn.role}"
        exit_step = 1 + turn_choice(key, name, turn.turn.index, len(distill.levels))
    # Rollouts are dealt over a sequence group by clips, or else by chunks; scores by frames.
    share = share_of(sequence, len(clips.draws))
    own = slice(share.clips.start, share.clips.stop)
    seen = rows_of(clips.conditions, own)
    exits = rollout(student, clips, turn, exit_step, own, seen)
    clean = to_frames(sequence, share, torch.cat([one.clean for one in exits], dim=1))

    level, scored = levels_of(clips, turn, clean)
    noise = clips.normal("score/noise")
    figures = {
        "exit": torch.full_like(clips.draws, exit_step, dtype=torch.float32),
        "sigma": sequence.mean(level, (level > 0).float()),
        "clamped": sequence.mean(at_the_clamp(level, distill.score_sigma), (level > 0).float()),
    }
    fake = bound(networks[CRITIC], clips.conditions, sequence)
    if turn.turn.role == CRITIC:
        return ObjectiveOutput(
            critic_loss(fake, clean, noise, level, sequence.mean, scored=scored), figures
        )
    found = score_difference(
        clean,
        noise,
        level,
        teacher_velocity(networks[TEACHER], clips, turn),
        fake,
        sequence.mean,
        weight=distill.weight,
        scored=scored,
        scopes=chunk_scopes(clips, turn) if distill.normaliser == "chunk" else None,
    )
    weight = scored_frames(level, scored)
    loss = 0.5 * sequence.mean(found.g.square().mean(dim=(2, 3, 4)), weight)
    g = to_clips(sequence, share, found.g / elements(clips, turn, clean))
    part = {"turn": share.turn, "of": share.of}
    pieces = late_losses(student, exits, seen, g, layout, **part, kernels=turn.kernels)
    count, direction = -(-len(exits) // share.of), found.g.sum(dim=(1, 3, 4))
    return ObjectiveOutput(loss, {**figures, "gap": found.gap}, pieces, count, direction)


def rows_of(conditions: Conditions, rows: slice) -> Conditions:
    """Return the conditions of some clips of a batch."""
    keep = conditions.camera_keep
    fields = {name: value[rows] for name, value in conditions.fields.items()}
    return replace(conditions, fields=fields, camera_keep=keep if keep is None else keep[rows])


def rollout(
    student: WorldModel,
    clips: Clips,
    turn: RoleTurn,
    exit_step: int,
    rows: slice,
    conditions: Conditions,
) -> list[ChunkExit]:
    """Return the chunks of some whole clips at the exit step, all on this process; with the past of
    each where a student's gradient needs it."""
    distill = turn.distill
    keep = turn.turn.role == STUDENT and distill.history_states == "keep"
    return list(
        roll_out(
            student,
            turn.first_latent[rows],
            conditions,
            sampling_levels(distill.levels),
            clips.key,
            clips.draws[rows],
            turn.sequences[STUDENT].layout,
            exit=exit_step,
            sampler=distill.sampler,
            context_sigma=distill.context_sigma,
            keep_history=keep,
            kernels=turn.kernels,
        )
    )


def levels_of(clips: Clips, turn: RoleTurn, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noise level of each local frame, 0 at the given first one, and 1 at frames that
    count, [B, t] each."""
    sequence, layout = turn.sequences[CRITIC], turn.sequences[STUDENT].layout
    level = score_sigma(clips.key, clips.draws, turn.distill.score_sigma, clips.chunk_index())
    given = first_frames(layout, sequence.frames, clean.device)
    counted = scored_range(turn.distill.scored_frames, layout, clips.key, turn.turn.index)
    place = torch.arange(sequence.frames.start, sequence.frames.stop, device=clean.device)
    scored = (place >= counted.start) & (place < counted.stop)
    return torch.where(given, 0.0, level), scored.float().expand_as(level)


def elements(clips: Clips, turn: RoleTurn, clean: Tensor) -> int:
    """Return the numbers per whole clip that have a loss."""
    layout = turn.sequences[STUDENT].layout
    counted = scored_range(turn.distill.scored_frames, layout, clips.key, turn.turn.index)
    given = first_frames(layout, counted, clean.device)
    return max(1, len(counted) - int(given.sum())) * clean[0, :1].numel()


def chunk_scopes(clips: Clips, turn: RoleTurn) -> Tensor:
    """Return the local frames of each chunk of the student, bool [chunks, t]."""
    index = clips.chunk_index()
    chunks = torch.arange(len(turn.sequences[STUDENT].layout.chunk_starts), device=index.device)
    return chunks[:, None] == index[None]


def bound(network: WorldModel, conditions: Conditions, sequence: SequenceShard) -> Velocity:
    """Return a network as a function of noisy latents and their levels."""
    return partial(_call, network, conditions, sequence)


def _call(
    network: WorldModel,
    conditions: Conditions,
    sequence: SequenceShard,
    noisy: Tensor,
    level: Tensor,
) -> Tensor:
    velocity: Tensor = network(noisy, level, conditions, sequence)
    return velocity


def teacher_velocity(teacher: WorldModel, clips: Clips, turn: RoleTurn) -> Velocity:
    """Return the guided teacher: without any of the guided conditions, and one pass with each."""
    weights, sequence = turn.distill.guidance, turn.sequences[TEACHER]
    if not weights:
        return bound(teacher, clips.conditions, sequence)
    seen = {
        name: bound(teacher, without(clips, set(weights) - {name}), sequence) for name in weights
    }
    return guided_velocity(bound(teacher, without(clips, set(weights)), sequence), seen, weights)


def without(clips: Clips, names: set[str]) -> Conditions:
    """Return the clips' conditions without some: the camera dropped, the null text, controls
    unknown, and at rest for a model that knows no other word for it."""
    conditions, everywhere = clips.conditions, torch.ones_like(clips.draws, dtype=torch.bool)
    if "camera" in names:
        conditions = replace(conditions, camera_keep=~everywhere)
    if "text" in names:
        conditions = drop_text(conditions, everywhere)
    if "controls" in names and conditions.controls is not None:
        rest = torch.zeros_like(conditions.controls)
        conditions = replace(conditions.with_fields(controls=rest), controls_keep=~everywhere)
    return conditions
