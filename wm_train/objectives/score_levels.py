"""Draw the noise levels at which score networks compare a student's clips, and the frames that
count. Every number is a function of (seed, stage, purpose, draw, frame or turn)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from wm_train.config.roles import CRITIC, STUDENT, ScoreSigmaConfig, frames_of
from wm_train.noise import NoiseKey, host_uniform, random_words, unit_interval
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.objectives.flow_matching import truncated_logit_normal
from wm_train.objectives.score_difference import ClipMean
from wm_train.sampling.levels import first_frames, shift_sigma, starts_of, unshift_sigma

PURPOSE, OF_TURN = "score/sigma", "score/sigma/turn"
MIDDLES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the fifths into which noise levels are sorted
SHARE_AT, LOSS_AT = "share_at_sigma_", "loss_at_sigma_"


@dataclass(frozen=True)
class Judged:
    """Hold what score networks judge of clips in a turn.

    level: noise level of each local frame, [B, t], 0 at the first one if it is given clean; scored:
    [B, t], 1 at frames that count; counted: the range of these in the clip; frames: how many of
    them have a loss; scopes: bool [K, t], the local frames of each scope of the normaliser, None:
    one scope.
    """

    level: Tensor
    scored: Tensor
    counted: FrameRange
    frames: int
    scopes: Tensor | None


def judged(clips: Clips, turn: RoleTurn) -> Judged:
    """Draw the levels of one turn, and choose the frames that count in it."""
    sequence, layout = turn.sequences[CRITIC], turn.sequences[STUDENT].layout
    index, chunks = clips.chunk_index(), len(layout.chunk_starts)
    levels = turn.distill.score_sigma
    drawn = torch.full_like(clips.draws, turn.turn.index) if levels.per == "turn" else clips.draws
    level = score_sigma(clips.key, drawn, levels, index, chunks)
    given = first_frames(layout, sequence.frames, index.device)
    counted = scored_range(turn.distill.scored_frames, layout, clips.key, turn.turn.index)
    place = torch.arange(sequence.frames.start, sequence.frames.stop, device=index.device)
    scored = (place >= counted.start) & (place < counted.stop) & ~given
    scopes = None
    if turn.distill.normaliser == "chunk":
        scopes = torch.arange(chunks, device=index.device)[:, None] == index[None]
    return Judged(
        torch.where(given, 0.0, level) if turn.clean_first else level,
        scored.float().expand_as(level),
        counted,
        max(1, len(counted) - sum(starts_of(layout, counted))),
        scopes,
    )


def score_sigma(
    key: NoiseKey, draws: Tensor, config: ScoreSigmaConfig, chunk_index: Tensor, chunks: int
) -> Tensor:
    """Return the noise level of each local frame, fp32 [B, t].

    One level per clip or per chunk; with per=turn `draws` holds the turn's number. uniform_clamped:
    uniform, shifted, clamped to [low, high], so that the draws beyond pile up at the ends
    (Self-Forcing; SANA-WM's public code); logit_normal: shifted, truncated to [low, high] without a
    pile. chunk_index: of each local frame, int64 [t]; chunks: of the whole clip, so that a chunk's
    number is the same on every shard.
    """
    places = chunk_index if config.per == "chunk" else torch.zeros_like(chunk_index)
    count = chunks if config.per == "chunk" else 1
    purpose = OF_TURN if config.per == "turn" else PURPOSE
    uniform = unit_interval(random_words(key, purpose, draws, (0, count), 1)[:, :, 0, 0])
    if config.law == "uniform_clamped":
        sigma = shift_sigma(uniform, config.shift).clamp(config.low, config.high)
    else:
        ends = unshift_sigma(config.low, config.shift), unshift_sigma(config.high, config.shift)
        quantile = uniform.cpu().double()
        plain = truncated_logit_normal(quantile, config.mean, config.std, ends).to(uniform.device)
        sigma = shift_sigma(plain, config.shift).clamp(config.low, config.high)  # of rounding
    return sigma[:, places]


def at_the_clamp(level: Tensor, config: ScoreSigmaConfig) -> Tensor:
    """Return 1 where a level [B, t] sits at an end of the range, fp32 [B, t]; 0 at given frames."""
    return ((level > 0) & ((level <= config.low) | (level >= config.high))).float()


def by_level(
    level: Tensor, weight: Tensor, mean: ClipMean, error: Tensor | None = None
) -> dict[str, Tensor]:
    """Return, by fifths of the noise levels, the share of the frames with a loss that are in each,
    and the part of the mean error [B, t] that falls there, [B] each; one exchange."""
    place = (level * len(MIDDLES)).long().clamp(max=len(MIDDLES) - 1)
    inside = [(place == i).to(level.dtype) for i in range(len(MIDDLES))]
    parts = inside if error is None else [*inside, *(one * error for one in inside)]
    found = mean(torch.cat(parts), weight.repeat(len(parts), 1)).chunk(len(parts))
    names = [f"{what}{middle}" for what in (SHARE_AT, LOSS_AT) for middle in MIDDLES]
    return dict(zip(names, found, strict=False))


def mean_at_levels(figures: Mapping[str, float]) -> dict[str, float]:
    """Turn the parts of `by_level`, averaged over clips, into the mean error of each fifth; a fifth
    without frames has none."""
    found = {}
    for name, value in figures.items():
        share = figures.get(name.replace(LOSS_AT, SHARE_AT), 0.0)
        if not name.startswith(LOSS_AT):
            found[name] = value
        elif share > 0:
            found[name] = value / share
    return found


def turn_share(key: NoiseKey, purpose: str, turn: int) -> float:
    """Return a uniform number in (0, 1) of one turn, the same on all processes."""
    return host_uniform(key, purpose, turn)


def turn_choice(key: NoiseKey, purpose: str, turn: int, count: int) -> int:
    """Return a uniform number from 0 to count - 1 of one turn, the same on all processes."""
    return min(int(turn_share(key, purpose, turn) * count), count - 1)


def scored_range(text: str, layout: ClipLayout, key: NoiseKey, turn: int) -> FrameRange:
    """Return the frames that score networks judge in this turn: `all`, the `last n`, or a `window
    n` that starts anywhere, drawn by the turn. A clip that is no longer than n counts whole."""
    count = frames_of(text)
    if count is None or count >= layout.frames:
        return FrameRange(0, layout.frames)
    last = layout.frames - count
    start = last if text.startswith("last") else turn_choice(key, "score/window", turn, last + 1)
    return FrameRange(start, start + count)
