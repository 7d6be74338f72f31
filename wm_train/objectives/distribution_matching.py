"""Train a few-step student by matching distributions on its own rollouts (DMD, Yin et al. 2024;
Self-Forcing; SANA-WM §3.1 stage 4 and §5.4).

Both kinds of turn begin with a rollout of the student up to an exit step that is drawn by the turn.
In a student's turn the score networks compare the clips at one noise level, and the difference is
the loss's gradient with respect to the student's clean predictions; it is passed on chunk by chunk
or in one packed pass (`student_rollouts`). In a critic's turn the critic learns to denoise the
clips, by flow matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from parallel.sequence import WholeClip
from parallel.transpose import to_frames
from wm_train.conditioning import Conditions
from wm_train.config.roles import CRITIC, STUDENT, TEACHER
from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, ObjectiveOutput, RoleTurn
from wm_train.objectives.config import DistributionMatchingConfig
from wm_train.objectives.score_difference import critic_errors, score_difference, scored_frames
from wm_train.objectives.score_levels import at_the_clamp, by_level, judged
from wm_train.objectives.student_rollouts import GRADIENTS, make_rollouts, teachers
from wm_train.sampling.experts import Model, by_frame
from wm_train.sampling.guidance import Guidance, guided, guided_passes, velocities


def distribution_matching(
    networks: Mapping[str, WorldModel],
    clips: Clips,
    config: DistributionMatchingConfig,
    turn: RoleTurn,
) -> ObjectiveOutput:
    """Return the losses of one turn of the student or the critic.

    Loss of a student's turn: half the mean square of its gradient g, a measure of distance only;
    its pieces carry the gradient. Metrics: exit, sigma, clamped (share of levels at an end of their
    range), `by_level`; in a student's turn gap, the relative difference of the score networks, isg.
    """
    distill, sequence = turn.distill, turn.sequences[CRITIC]
    made = turn.made or make_rollouts(networks[STUDENT], clips, turn)
    clean, found = to_frames(sequence, made.share, made.clean()), judged(clips, turn)
    noise, level, scored = clips.normal("score/noise"), found.level, found.scored
    free = (level > 0).float()
    figures = {
        "exit": torch.full_like(clips.draws, made.exit_step, dtype=torch.float32),
        "sigma": sequence.mean(level, free),
        "clamped": sequence.mean(at_the_clamp(level, distill.score_sigma), free),
    }
    fake = partial(_velocity, networks[CRITIC], [clips.conditions], [sequence], {})
    weight = scored_frames(level, scored)
    if turn.turn.role == CRITIC:
        error = critic_errors(fake, clean, noise, level)
        figures |= by_level(level, weight, sequence.mean, error.detach())
        return ObjectiveOutput(sequence.mean(error, weight), figures)
    whole = (clips.draws, turn.sequences[TEACHER])
    passes = guided_passes(clips.conditions, distill.guidance, *whole)
    real = partial(_velocity, by_frame(teachers(networks, distill)), *passes, distill.guidance)
    compared = score_difference(
        clean,
        noise,
        level,
        real,
        fake,
        sequence.mean,
        weight=distill.weight,
        scored=scored,
        scopes=found.scopes,
    )
    g = compared.g
    loss = 0.5 * sequence.mean(g.square().mean(dim=(2, 3, 4)), weight)
    per_clip = g / (found.frames * clean[0, :1].numel())
    losses = GRADIENTS[distill.schedule, distill.gradient](
        networks, clips, turn, made, found, per_clip
    )
    figures |= {"gap": compared.gap, **by_level(level, weight, sequence.mean), **losses.figures}
    return ObjectiveOutput(loss, figures, losses.pieces, losses.count, g.sum(dim=(1, 3, 4)))


def _velocity(
    network: Model,
    views: list[Conditions],
    shards: list[WholeClip],
    guidance: Guidance,
    noisy: Tensor,
    level: Tensor,
) -> Tensor:
    """Return a network's velocity, guided by its views of the conditions."""
    return guided(velocities(network, noisy, level, views, shards), guidance)
