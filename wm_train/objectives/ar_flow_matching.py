"""Train by flow matching of one chunk of a long clip behind true frames before it, drawn to the
frame where the chunk begins (MoWorld §4.2-4.3, eq. 6-12).

Each clip draws a chunk. Its window (`sampling/history.py`) holds a history, the anchor and the
chunk; anchor and chunk are noised to one level. The loss is that of the velocity at the chunk, and
`anchor_weight` times the squared error of the clean prediction at the anchor, the last frame before
the chunk. Noise belongs to the clip's frames, so windows that share frames share their noise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from wm_train.config.kinds import HistoryConfig
from wm_train.models.spec import WorldModel
from wm_train.objectives.clips import Clips, ObjectiveOutput
from wm_train.objectives.config import ArFlowMatchingConfig
from wm_train.objectives.flow_matching import clip_sigma, dropped_conditions
from wm_train.objectives.score_difference import noised, spread, widened
from wm_train.sampling.history import (
    Window,
    chunk_shares,
    clip_cameras,
    window_conditions,
    window_noise,
    window_of,
)


def ar_flow_matching(
    model: WorldModel, clips: Clips, config: ArFlowMatchingConfig
) -> ObjectiveOutput:
    """Return the loss of one chunk per clip, [B]. Metrics: sigma, chunk (its number), flow (the
    flow-matching part), anchor (the squared error there).

    Clips pass one by one, as each has a window of its own. Raises ValueError for clips without a
    whole chunk.
    """
    sigma = clip_sigma(clips.key, clips.draws, config)
    seen = dropped_conditions(clips.conditions, clips.key, clips.draws, config)
    clips, history = replace(clips, conditions=seen), config.history
    (whole,) = clips.sequence.gather([clips.latents])  # [B, T, C, h, w] everywhere
    drawn = chunk_shares(clips.key, clips.draws)
    rows, numbers = [], []
    for row, cameras in enumerate(clip_cameras(seen, history, len(drawn))):
        number, chunk = drawn_chunk(clips.sequence.layout, row, drawn[row], history)
        window = window_of(cameras, chunk, history)
        rows.append(window_losses(model, clips, row, window, whole, sigma, config))
        numbers.append(float(number))
    flow, anchor = torch.stack(rows, dim=1)
    loss = flow + config.anchor_weight * anchor if config.anchor_weight else flow
    metrics = {"sigma": sigma, "chunk": sigma.new_tensor(numbers), "flow": flow, "anchor": anchor}
    return ObjectiveOutput(loss, metrics)


def drawn_chunk(
    layout: ClipLayout, row: int, share: float, history: HistoryConfig
) -> tuple[int, range]:
    """Return the number and the frames of the chunk of a clip at `share` (0 to 1) of its chunks."""
    frames = layout.frames if layout.valid_frames is None else layout.valid_frames[row]
    chunks = history.chunks(frames)
    if not chunks:
        raise ValueError(
            f"windows failed: got a clip of {frames} latent frames, expected at least"
            f" {history.chunk + 1}, the first and a chunk (key objective.history.chunk). Fix:"
            f" objective.history.chunk={max(1, frames - 1)}, or longer clips"
        )
    number = min(int(share * len(chunks)), len(chunks) - 1)
    return number, chunks[number]


def window_losses(
    model: WorldModel,
    clips: Clips,
    row: int,
    window: Window,
    whole: Tensor,
    sigma: Tensor,
    config: ArFlowMatchingConfig,
) -> Tensor:
    """Return the flow-matching loss and the anchor's squared error of one clip, [2]."""
    history, sequence = config.history, clips.sequence.relaid(window.layout)
    clean, draw, level = whole[row : row + 1, list(window.ids)], clips.draws[row : row + 1], sigma
    place = torch.arange(len(window.ids), device=clean.device)[None]
    past = level[row] if history.time == "chunk" else torch.full_like(level[row], history.noise)
    levels = torch.where(place < window.slots, past, level[row])
    shape, spoiled = tuple(clean.shape[2:]), history.time == "chunk" or history.noise > 0
    noise = window_noise(clips.key, "noise", draw, window, shape, spoiled)
    local = slice(sequence.frames.start, sequence.frames.stop)
    seen = window_conditions(clips.conditions, row, window, clean)
    clean, noise, levels, place = (x[:, local] for x in (clean, noise, levels, place))
    noisy = noised(clean, noise, levels)
    velocity = widened(model(noisy, levels, seen, sequence))
    flow = (velocity - (noise - clean)).square().mean(dim=(2, 3, 4))
    anchor = (noisy - spread(levels) * velocity - clean).square().mean(dim=(2, 3, 4))
    at = place == window.slots
    counted = place >= window.slots if config.anchor_in_fm else place > window.slots
    weights = torch.cat((counted, at)).to(flow.dtype)
    return sequence.mean(torch.cat((flow, anchor)), weights)
