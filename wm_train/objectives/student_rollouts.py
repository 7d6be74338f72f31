"""Roll a student out in a turn, and pass the gradient of its clean predictions back to it.

How clips are made and how the gradient returns are rows of two tables, named by `distill.schedule`
and `distill.gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from parallel.reference import Kernels
from parallel.sequence import LocalSequence, WholeClip
from parallel.transpose import share_of, to_clips, to_frames
from wm_train.conditioning import Conditions
from wm_train.config.roles import CRITIC, STUDENT, TEACHER, DistillConfig
from wm_train.models.spec import WorldModel
from wm_train.noise import NoiseKey
from wm_train.objectives.alignment import middle_level, segment_loss
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.score_levels import Judged, turn_choice, turn_share
from wm_train.sampling.chunks import Beside, ChunkExit, Rollouts, Streams, late_losses, roll_out
from wm_train.sampling.experts import Experts, Model, by_frame, experts_above
from wm_train.sampling.guidance import guidance_views, guided_passes
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.packed import behind_clean, packed_losses, row_of
from wm_train.sampling.steps import Velocity
from wm_train.sampling.windows import window_losses, window_rollout


def in_windows(
    student: WorldModel,
    first: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    layout: ClipLayout,
    *,
    distill: DistillConfig,
    exit: int,
    kernels: Kernels,
    keep_history: bool,
) -> Iterator[ChunkExit]:
    """Roll a student without a memory out in windows on this process."""
    assert distill.history is not None, "checked before the start"
    clip = LocalSequence(layout, kernels)
    given = (student, first, conditions, levels, key, draws, clip, distill.history)
    return window_rollout(*given, sampler=distill.sampler, exit=exit)


def in_chunks(*given: Any, distill: DistillConfig, **how: Any) -> Iterator[ChunkExit]:
    """Roll a causal student out on this process, its past in a state."""
    return roll_out(*given, sampler=distill.sampler, context_sigma=distill.context_sigma, **how)


# of a student model, as `roll_out`: (model, first latents, conditions, levels, key, draws, layout)
SCHEDULES: dict[str, Callable[..., Iterator[ChunkExit]]] = {
    "chunk": in_chunks,
    "windows": in_windows,
}


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
        distill=distill,
        exit=exit_step,
        keep_history=turn.turn.role == STUDENT and keeps_history(distill),
        kernels=turn.kernels,
    )
    return Rollouts(list(exits), exit_step, share, seen)


def teachers(networks: Mapping[str, Model], distill: DistillConfig) -> Experts:
    """Return the teacher and the experts that answer in its place from some noise level on."""
    above: dict[float, Model] = {level: networks[role] for role, level in distill.experts.items()}
    return experts_above(networks[TEACHER], above)


def keeps_history(distill: DistillConfig) -> bool:
    """Return whether a student's rollout stores the past of each chunk for its gradient."""
    return distill.gradient == "late" and distill.history_states == "keep"


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
        figures["isg"] = torch.zeros_like(clips.draws, dtype=torch.float32)
        own = slice(share.clips.start, share.clips.stop)
        views = guidance_views(made.conditions, turn.distill.guidance, clips.draws[own])
        teacher = (teachers(networks, turn.distill), views, layout, turn.distill.guidance)
        loss = segment_guidance(clips, turn, made, found, figures["isg"][own])
        beside = Beside(Streams(*teacher, turn.kernels), loss)
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


def packed(
    networks: Mapping[str, WorldModel],
    clips: Clips,
    turn: RoleTurn,
    made: Rollouts,
    found: Judged,
    g: Tensor,
) -> StudentLosses:
    """Return one loss per clip, all of its chunks made again in one pass, split over a sequence
    group as the score networks are. Arguments as for `late`."""
    sequence, student = turn.sequences[STUDENT], networks[STUDENT]
    whole = local_exits(made, sequence)
    figures: dict[str, Tensor] = {}
    beside = None
    if turn.distill.isg:
        figures["isg"] = torch.zeros_like(clips.draws, dtype=torch.float32)

        def beside(one: ChunkExit, number: int, flow: Tensor, student: Velocity) -> Tensor:
            own = slice(number, number + 1)
            given = (turn.distill.guidance, clips.draws[own], sequence)
            views, shards = guided_passes(clips.conditions.rows(own), *given)
            asked = (one, views, shards, turn.distill.guidance)
            loss = segment_guidance(clips, turn, made, found, figures["isg"][own])
            teacher = by_frame(teachers(networks, turn.distill))
            return loss(one, flow, student, behind_clean(teacher, *asked))

    rows = [row_of(whole, number) for number in range(len(g))]
    pieces = packed_losses(student, rows, clips.conditions, g, sequence, beside)
    return StudentLosses(pieces, len(g), figures)


def local_exits(made: Rollouts, sequence: WholeClip) -> ChunkExit:
    """Return the local frames of all clips of the micro-batch at their exit step, in one exchange:
    the rollouts of whole clips [n, T, …] of each process become [B, t, …]."""
    exits, channels = made.exits, made.exits[0].clean.shape[2]

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in exits], dim=1)

    maps = torch.cat([rows("noisy"), rows("clean"), rows("context")], dim=2)
    noisy, clean, context = to_frames(sequence, made.share, maps).split(channels, dim=2)
    local = slice(sequence.frames.start, sequence.frames.stop)
    levels = (rows(name)[:1, local] for name in ("level", "context_level"))  # equal in all clips
    level, context_level = (x.expand(len(noisy), -1) for x in levels)
    given = (noisy, level, exits[0].sigma, clean, None, context, context_level)
    return ChunkExit(sequence.frames, *given)


def late_in_windows(
    networks: Mapping[str, WorldModel],
    clips: Clips,
    turn: RoleTurn,
    made: Rollouts,
    found: Judged,
    g: Tensor,
) -> StudentLosses:
    """Return one loss per chunk and clip, its window made again with gradients. Arguments as for
    `late`. Figures updates_<expert>: 1 for the expert that this turn trains, 0 for the others, so
    that their sum over turns counts updates."""
    share, exits, history = made.share, made.exits, turn.distill.history
    assert history is not None, "checked before the start"
    draws = clips.draws[share.clips.start : share.clips.stop]
    own = to_clips(turn.sequences[CRITIC], share, g)
    given = (networks[STUDENT], exits, made.conditions, draws, own, history)
    how = {"turn": share.turn, "of": share.of, "kernels": turn.kernels}
    pieces = window_losses(*given, **how)  # type: ignore[arg-type]
    trained = networks[STUDENT].passes_at(exits[0].sigma)
    figures = {
        f"updates_{name}": torch.full_like(clips.draws, float(passes), dtype=torch.float32)
        for name, passes in trained.items()
    }
    return StudentLosses(pieces, -(-len(exits) // share.of) * len(draws), figures)


# (schedule, gradient) -> the student's losses
GRADIENTS: dict[tuple[str, str], Callable[..., StudentLosses]] = {
    ("chunk", "late"): late,
    ("chunk", "packed"): packed,
    ("windows", "late"): late_in_windows,
}


def segment_guidance(
    clips: Clips, turn: RoleTurn, made: Rollouts, found: Judged, rows: Tensor
) -> Callable[[ChunkExit, Tensor, Velocity, Velocity], Tensor]:
    """Return intra-segment guidance as a loss beside, of a chunk or of all local frames of clips:
    the causal teacher sees what the student made with the past that the student made, guided as in
    the score difference.

    rows: [n], to which this process's part of the loss per clip is added, times the number of
    processes that share the clip, as their figures are averaged.
    """
    distill, group = turn.distill, turn.sequences[CRITIC].comm.members[0].size
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

    return loss


def _places(chunk: FrameRange, counted: FrameRange) -> slice:
    """Return the places in a chunk of the frames that count."""
    start, stop = max(chunk.start, counted.start), min(chunk.stop, counted.stop)
    return slice(start - chunk.start, max(start, stop) - chunk.start)
