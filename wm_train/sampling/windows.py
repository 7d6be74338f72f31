"""Make long clips chunk by chunk with networks that keep no past: each chunk is denoised in a
window with some of the frames before it (`history.py`; MoWorld §4.2).

Sampling and the rollouts of a student are the same passes. As in `chunks.py`, a student's gradient
needs the exit pass of each chunk once more, and no gradient flows through histories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import accumulation_dtype
from parallel.reference import REFERENCE, Kernels
from parallel.sequence import LocalSequence, WholeClip
from wm_train.conditioning import Conditions
from wm_train.config.kinds import HistoryConfig
from wm_train.noise import NoiseKey
from wm_train.sampling.chunks import ChunkExit
from wm_train.sampling.experts import Experts, Model, experts_of
from wm_train.sampling.guidance import UNGUIDED, Guidance, guidance_views, guided, velocities
from wm_train.sampling.history import (
    Window,
    clip_cameras,
    window_conditions,
    window_noise,
    window_of,
)
from wm_train.sampling.steps import Passed, clean_of, denoise


@dataclass(frozen=True)
class WindowRow:
    """Hold one clip's window at its exit step: `shown`, the latents of all its frames [1, W, C, h,
    w] as far as they are known; noise [1, t, C, h, w] of history; passed: the step itself."""

    view: Window
    shown: Tensor
    noise: Tensor
    passed: Passed


@dataclass(frozen=True)
class WindowExit(ChunkExit):
    """Store one chunk of a rollout, as `ChunkExit`, and the windows in which it was made, a row for
    each clip. `chunk` begins at frame 0 in the first, and ends where the next begins."""

    rows: tuple[WindowRow, ...] = ()


def window_velocity(
    experts: Experts,
    conditions: Conditions,
    number: int,
    row: WindowRow,
    sequence: WholeClip,
    history: HistoryConfig,
    draw: Tensor,
    guidance: Guidance,
    latents: Tensor,
    level: Tensor,
    sigma: float,
) -> Tensor:
    """Return the guided velocity of the local frames of clip `number`'s window, latents [1, t, C,
    h, w] at the levels [1, t], history given as configured. sequence: of the window."""
    local = slice(sequence.frames.start, sequence.frames.stop)
    past = torch.arange(local.start, local.stop, device=level.device)[None] < row.view.slots
    spoiled = sigma if history.time == "chunk" else history.noise
    given = (1 - spoiled) * row.shown[:, local] + spoiled * row.noise if spoiled else None
    if given is not None:
        latents = torch.where(past[:, :, None, None, None], given, latents)
        level = torch.where(past, spoiled, level)
    seen = window_conditions(conditions, number, row.view, row.shown)
    views = guidance_views(seen, guidance, draw)
    shards = [sequence] * len(views)
    made = velocities(experts.at(sigma), latents, level, views, shards)
    return guided(made, experts.weights(sigma, guidance))


@torch.no_grad()
def window_rollout(
    model: Model | Experts,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    sequence: WholeClip,
    history: HistoryConfig,
    *,
    guidance: Guidance = UNGUIDED,
    sampler: str = "euler",
    exit: int | None = None,
) -> Iterator[WindowExit]:
    """Yield the chunks of clips in order, each at step `exit` (None: the last), on every rank.

    first_latent: [B, C, h, w], frame 0; conditions: of whole clips; sequence: of the whole clip,
    over whose ranks each window is split; draws: int64 [B], which key the noise, with the frames.
    Raises ValueError for clips without a whole chunk.
    """
    frames, experts = sequence.layout.frames, experts_of(model)
    chunks = replace(history, tail="shift").chunks(frames)
    if not chunks:
        raise ValueError(
            f"sampling failed: got clips of {frames} latent frames, expected at least"
            f" {history.chunk + 1}, the first and a chunk (key sampler.history.chunk). Fix:"
            " a smaller chunk, or longer clips"
        )
    cameras = clip_cameras(conditions, history, len(draws))
    given = first_latent.to(accumulation_dtype(first_latent.dtype))
    known = given[:, None].repeat(1, frames, 1, 1, 1)
    for place, chunk in enumerate(chunks):
        stop = chunks[place + 1].start if place + 1 < len(chunks) else frames
        rows = tuple(
            _made(
                (experts, conditions, number),
                window_of(cameras[number], chunk, history),
                known[number : number + 1],
                (key, draws[number : number + 1]),
                sequence,
                history,
                guidance,
                levels,
                sampler,
                exit,
            )
            for number in range(len(draws))
        )
        made = torch.cat([clean for _, clean in rows])
        known[:, chunk.start : chunk.stop] = made
        held = FrameRange(0 if place == 0 else chunk.start, stop)
        passed = [row.passed for row, _ in rows]
        clean = known[:, held.start : held.stop].clone()
        level = torch.zeros_like(clean[:, :, 0, 0, 0])
        facts = (held, clean, level, passed[0].sigma, clean, None, clean, level)
        yield WindowExit(*facts, tuple(row for row, _ in rows))


def _made(
    whose: tuple[Experts, Conditions, int],
    window: Window,
    known: Tensor,
    keyed: tuple[NoiseKey, Tensor],
    sequence: WholeClip,
    history: HistoryConfig,
    guidance: Guidance,
    levels: Sequence[float],
    sampler: str,
    exit: int | None,
) -> tuple[WindowRow, Tensor]:
    """Denoise one clip's window; return it at its exit step, and the whole chunk."""
    key, draw = keyed
    part, shape = sequence.relaid(window.layout), tuple(known.shape[2:])
    local = slice(part.frames.start, part.frames.stop)
    spoiled = history.time == "chunk" or history.noise > 0
    noise = window_noise(key, "rollout", draw, window, shape, spoiled)[:, local]
    shown = known[:, list(window.ids)]
    past = torch.arange(local.start, local.stop, device=draw.device)[None] < window.slots

    def velocity(latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        experts, conditions, number = whose
        how = (history, draw, guidance, latents, level, sigma)
        return window_velocity(experts, conditions, number, row, part, *how)

    def fresh(step: int) -> Tensor:
        return window_noise(key, f"rollout/step{step}", draw, window, shape, False)[:, local]

    start = Passed(noise, past.float(), 1.0, noise)
    row = WindowRow(window, shown, noise, start)
    seen = shown[:, local]
    passed = denoise(velocity, noise, past, seen, levels, sampler=sampler, fresh=fresh, exit=exit)
    (clean,) = part.gather([passed.clean])
    return replace(row, passed=passed), clean[:, window.slots + 1 :]


def window_losses(
    model: Model,
    exits: Sequence[WindowExit],
    conditions: Conditions,
    draws: Tensor,
    g: Tensor,
    history: HistoryConfig,
    *,
    turn: int = 0,
    of: int = 1,
    kernels: Kernels = REFERENCE,
) -> Iterator[Tensor]:
    """Yield for each chunk and clip a scalar whose gradient is its part of the student's, as
    `late_losses`: the sum of g times the clean prediction, its exit step made again with gradients.

    exits: of `window_rollout` on this process alone; g: [B, T, C, h, w]; turn, of: as there.
    """
    experts = experts_of(model)
    for first in range(0, len(exits), of):
        group = exits[first : first + of]
        place = min(turn, len(group) - 1)
        found = group[place]
        for number, row in enumerate(found.rows):
            window, passed = row.view, row.passed
            sequence = LocalSequence(ClipLayout(1), kernels).relaid(window.layout)
            draw = draws[number : number + 1]
            given = (row, sequence, history, draw, UNGUIDED, passed.noisy, passed.level)
            flow = window_velocity(experts, conditions, number, *given, passed.sigma)
            clean = clean_of(passed.noisy, flow, passed.sigma)[:, window.slots + 1 :]
            start = window.ids[window.slots + 1]
            wanted = g[number : number + 1, start : found.chunk.stop].detach()
            loss = (wanted * clean[:, : wanted.shape[1]]).sum()
            yield loss if place == turn else 0.0 * loss
