"""Roll a student out in a turn, and pass the gradient of its clean predictions back to it.

How clips are made and how the gradient returns are rows of two tables, named by `distill.schedule`
and `distill.gradient`, so that rolling windows and packed passes have a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.layout import FrameRange
from parallel.transpose import Share, share_of, to_clips
from wm_train.conditioning import Conditions
from wm_train.config.roles import CRITIC, STUDENT, TEACHER
from wm_train.models.spec import WorldModel
from wm_train.objectives.alignment import middle_level, segment_loss
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.score_levels import Judged, turn_choice, turn_share
from wm_train.sampling.chunks import Beside, ChunkExit, Streams, late_losses, roll_out
from wm_train.sampling.experts import experts_of
from wm_train.sampling.guidance import guidance_views
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.steps import Velocity


@dataclass(frozen=True)
class Rollouts:
    """Hold the clips that a process has rolled out, all their frames.

    exits: their chunks in order; exit_step: passes per chunk, from 1; share: which clips of the
    micro-batch they are, and whose gradients are this process's; conditions: theirs.
    """

    exits: Sequence[ChunkExit]
    exit_step: int
    share: Share
    conditions: Conditions

    def clean(self) -> Tensor:
        """Return the clean predictions, [n, T, C, h, w]."""
        return torch.cat([one.clean for one in self.exits], dim=1)


# of a student model, as `roll_out`: (model, first latents, conditions, levels, key, draws, layout)
SCHEDULES: dict[str, Callable[..., Iterator[ChunkExit]]] = {"chunk": roll_out}


def make_rollouts(student: WorldModel, clips: Clips, turn: RoleTurn) -> Rollouts:
    """Roll this process's part of the clips out, up to an exit step that the turn draws.

    They are dealt over a sequence group by clips, or where there are fewer, all are made by each.
    The past of chunks is stored where a student's gradient needs it.
    """
    distill, exit_step = turn.distill, len(turn.distill.levels)
    if distill.exit == "turn":
        name = f"exit/{turn.turn.role}"
        exit_step = 1 + turn_choice(clips.key, name, turn.turn.index, exit_step)
    share = share_of(turn.sequences[CRITIC], len(clips.draws))
    own = slice(share.clips.start, share.clips.stop)
    seen = clips.conditions.rows(own)
    exits = SCHEDULES[distill.schedule](
        student,
        turn.first_latent[own],
        seen,
        sampling_levels(distill.levels),
        clips.key,
        clips.draws[own],
        turn.sequences[STUDENT].layout,
        exit=exit_step,
        sampler=distill.sampler,
        context_sigma=distill.context_sigma,
        keep_history=turn.turn.role == STUDENT and distill.history_states == "keep",
        kernels=turn.kernels,
    )
    return Rollouts(list(exits), exit_step, share, seen)


@dataclass(frozen=True)
class StudentLosses:
    """Hold a student's losses, `count` of them, to be back-propagated one by one as they are taken
    (`ObjectiveOutput.pieces`), and figures [B] that are complete after the last."""

    pieces: Iterable[Tensor]
    count: int
    figures: Mapping[str, Tensor]


def late(
    networks: Mapping[str, WorldModel],
    clips: Clips,
    turn: RoleTurn,
    made: Rollouts,
    found: Judged,
    g: Tensor,
) -> StudentLosses:
    """Return one loss per chunk, made again with gradients; histories take none.

    g: [B, t, C, h, w], gradient of the clips' losses at the clean predictions of local frames.
    """
    sequence, layout, share = turn.sequences[CRITIC], turn.sequences[STUDENT].layout, made.share
    figures: dict[str, Tensor] = {}
    beside = None
    if turn.distill.isg:
        # Each process adds its own chunks or clips; the figures of a group are averaged.
        figures["isg"] = torch.zeros_like(clips.draws, dtype=torch.float32)
        rows = figures["isg"][share.clips.start : share.clips.stop]
        group = sequence.comm.members[0].size
        beside = segment_guidance(networks[TEACHER], clips, turn, made, found, rows, group)
    pieces = late_losses(
        networks[STUDENT],
        made.exits,
        made.conditions,
        to_clips(sequence, share, g),
        layout,
        turn=share.turn,
        of=share.of,
        kernels=turn.kernels,
        beside=beside,
    )
    return StudentLosses(pieces, -(-len(made.exits) // share.of), figures)


# `late` is named by distill.gradient
GRADIENTS: dict[str, Callable[..., StudentLosses]] = {"late": late}


def segment_guidance(
    teacher: WorldModel,
    clips: Clips,
    turn: RoleTurn,
    made: Rollouts,
    found: Judged,
    rows: Tensor,
    group: int,
) -> Beside:
    """Return intra-segment guidance as a loss beside: the causal teacher sees each chunk of the
    student with the past that the student has made, guided as in the score difference.

    rows: [n], to which the loss per clip is added, `group` times.
    """
    distill, layout = turn.distill, turn.sequences[STUDENT].layout
    own = slice(made.share.clips.start, made.share.clips.stop)
    views = guidance_views(made.conditions, distill.guidance, clips.draws[own])
    streams = Streams(experts_of(teacher), views, layout, distill.guidance, turn.kernels)
    sigma, following = sampling_levels(distill.levels)[made.exit_step - 1 : made.exit_step + 1]
    share = turn_share(clips.key, "isg/middle", turn.turn.index)
    middle = middle_level(sigma, following, share)

    def loss(chunk: ChunkExit, flow: Tensor, student: Velocity, teacher: Velocity) -> Tensor:
        free = (chunk.level > 0).to(flow.dtype)
        given = (flow, student, teacher, chunk.noisy, sigma, following, middle, free)
        each = segment_loss(*given)[:, _places(chunk.chunk, found.counted)].sum(dim=1)
        each = each / found.frames  # its part of the mean over the clip's frames with a loss
        rows.add_(each.detach().to(rows.dtype), alpha=group)
        return distill.isg * each.sum()

    return Beside(streams, loss)


def _places(chunk: FrameRange, counted: FrameRange) -> slice:
    """Return the places in a chunk of the frames that count."""
    start, stop = max(chunk.start, counted.start), min(chunk.stop, counted.stop)
    return slice(start - chunk.start, max(start, stop) - chunk.start)
