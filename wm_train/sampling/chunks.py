"""Roll out a student chunk by chunk up to an exit step, and take its gradient chunk by chunk later.

Source: Self Forcing's rollout; SANA-WM §3.1 stage 4 and §5.4. Every chunk is denoised up to one
step, the *exit*; its clean prediction is passed to the network once more, and what the verbs keep
of that pass is the past of the next chunk. The past takes no gradient. So the gradient of a loss of
all predictions is a sum over chunks, each of which needs the exit pass of its own chunk only:
`roll_out` makes the predictions without gradients, and once the loss's gradient g with respect to
them is known, `late_losses` makes each exit pass again, with gradients, one chunk at a time. A
student's memory is that of one chunk, however long the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from parallel.local_attention import accumulation_dtype
from parallel.reference import REFERENCE, Kernels
from parallel.sequence import LocalSequence, WholeClip
from parallel.streaming import StreamingSequence, StreamState
from parallel.transpose import Share
from wm_train.conditioning import Conditions
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.experts import Experts, Model
from wm_train.sampling.guidance import UNGUIDED, Guidance, guided, velocities
from wm_train.sampling.rollout import start_of
from wm_train.sampling.steps import Velocity, clean_of, denoise


@dataclass(frozen=True)
class ChunkExit:
    """Store one chunk of a rollout at its exit step, without gradients.

    noisy: [B, t, C, h, w], input of the exit step, given frames clean; level: [B, t], sigma of each
    frame, 0 at given ones; sigma: the exit step's; clean: the prediction noisy - sigma v, given
    frames as given; history: the past at this chunk, None if it is not kept; context and
    context_level: what the network is given of this chunk to make the past of the next.
    """

    chunk: FrameRange
    noisy: Tensor
    level: Tensor
    sigma: float
    clean: Tensor
    history: StreamState | None
    context: Tensor
    context_level: Tensor


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


class Streams:
    """Run networks on one chunk after another; each expert and each view of the conditions has a
    past of its own, as a past depends on the network."""

    def __init__(
        self,
        experts: Experts,
        views: Sequence[Conditions],
        layout: ClipLayout,
        guidance: Guidance = UNGUIDED,
        kernels: Kernels = REFERENCE,
    ) -> None:
        self.experts, self.views, self.guidance = experts, views, guidance
        self.layout, self.clip = layout, LocalSequence(layout, kernels)
        self.past = {expert: [StreamState()] * len(views) for expert in experts.models}

    def velocity(self, latents: Tensor, level: Tensor, sigma: float) -> Tensor:
        """Return the guided velocity of a chunk; the past stays as it is."""
        expert = self.experts.at(sigma)
        passed = self._sequences(expert, remember=False)
        made = velocities(expert, latents, level, self.views, passed)
        return guided(made, self.experts.weights(sigma, self.guidance))

    def remember(self, latents: Tensor, level: Tensor) -> None:
        """Pass a finished chunk through every network, and add it to the past."""
        for expert in self.past:
            passed = self._sequences(expert, remember=True)
            velocities(expert, latents, level, self.views, passed)
            self.past[expert] = [sequence.after() for sequence in passed]

    def here(self) -> Streams:
        """Return streams that stay at the chunk where these are now."""
        found = Streams(self.experts, self.views, self.layout, self.guidance, self.clip.kernels)
        found.past = dict(self.past)
        return found

    def _sequences(self, expert: Model, remember: bool) -> list[StreamingSequence]:
        return [StreamingSequence(self.clip, past, remember) for past in self.past[expert]]


def chunk_exits(
    streams: Streams,
    first_latent: Tensor,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    *,
    sampler: str,
    exit: int | None = None,
    context_sigma: float = 0.0,
) -> Iterator[ChunkExit]:
    """Yield the chunks of clips, each denoised up to step `exit` (None: the last), no history in
    them. Run it without gradients.

    The noise of a chunk's start is keyed "rollout", that before step k "rollout/step{k}", that of
    the context "rollout/context", each by draw and frame.
    """
    layout, shape = streams.layout, tuple(first_latent.shape[1:])
    for first in layout.chunk_starts:
        chunk = layout.chunk_of(first)
        fresh = partial(_fresh, key, draws, chunk, shape)
        noise, given, values = start_of(layout, chunk, first_latent, key, draws)
        passed = denoise(
            streams.velocity, noise, given, values, levels, sampler=sampler, fresh=fresh, exit=exit
        )
        context, level = passed.clean, torch.where(given, 0.0, context_sigma)
        if context_sigma:
            noise = fresh("context").to(context.dtype)
            mixed = (1.0 - context_sigma) * context + context_sigma * noise
            context = torch.where(given[:, :, None, None, None], context, mixed)
        yield ChunkExit(chunk, *passed, None, context, level)
        if chunk.stop == layout.frames:
            return  # no chunk follows that needs the past
        streams.remember(context, level)


def _fresh(
    key: NoiseKey, draws: Tensor, chunk: FrameRange, shape: tuple[int, ...], purpose: int | str
) -> Tensor:
    """Return the noise of a chunk before a step, or of its context."""
    name = purpose if isinstance(purpose, str) else f"step{purpose}"
    return normal(key, f"rollout/{name}", draws, (chunk.start, chunk.stop), shape)


@torch.no_grad()
def roll_out(
    model: Model,
    first_latent: Tensor,
    conditions: Conditions,
    levels: Sequence[float],
    key: NoiseKey,
    draws: Tensor,
    layout: ClipLayout,
    *,
    exit: int,
    sampler: str,
    context_sigma: float = 0.0,
    keep_history: bool = True,
    kernels: Kernels = REFERENCE,
) -> Iterator[ChunkExit]:
    """Yield the chunks of a student's clips at their exit step, without gradients.

    first_latent: [B, C, h, w], normalised, stays clean at the clip's first frame; levels: the
    sigmas of the steps from 1, and the 0 after them; draws: int64 [B], which key the noise;
    layout: the whole clip with its chunk starts, all on this device; exit: passes per chunk, 1 to
    the number of steps; sampler: euler | renoise; context_sigma: noise level of the pass that makes
    the past; keep_history: store the past of every chunk for `late_losses`, which otherwise makes
    it again.
    """
    streams = Streams(Experts((0.0,), (model,)), [conditions], layout, kernels=kernels)
    exits = chunk_exits(
        streams,
        first_latent,
        levels,
        key,
        draws,
        sampler=sampler,
        exit=exit,
        context_sigma=context_sigma,
    )
    for found in exits:
        yield replace(found, history=streams.past[model][0]) if keep_history else found


@dataclass(frozen=True)
class Beside:
    """Hold a loss that is added to that of each chunk, and a frozen network that it asks.

    streams: of the network, at the start of the clips; loss: (chunk, the student's velocity at its
    noisy latents, with gradients; the student; the network) -> a scalar. The networks are functions
    (latents, level, sigma) -> velocity with the chunk's past, to be called without gradients.
    """

    streams: Streams
    loss: Callable[[ChunkExit, Tensor, Velocity, Velocity], Tensor]


def late_losses(
    model: Model,
    exits: Sequence[ChunkExit],
    conditions: Conditions,
    g: Tensor,
    layout: ClipLayout,
    *,
    turn: int = 0,
    of: int = 1,
    kernels: Kernels = REFERENCE,
    beside: Beside | None = None,
) -> Iterator[Tensor]:
    """Yield for each chunk a scalar whose gradient is the chunk's part of the student's: the sum
    over [B, t, C, h, w] of g times the clean prediction, its exit step made again with gradients.

    exits: all chunks in order, of `roll_out`; g: [B, T, C, h, w], the loss's gradient with respect
    to the clean predictions. Back-propagate each loss before the next is taken, and only one chunk
    is in memory. Where the history was not kept, one pass per chunk makes it again. turn, of: take
    the chunk at place `turn` of every `of` chunks (`parallel.transpose.Share`); all callers make
    the same passes in the same order, so a last group without that place gives one loss of 0.
    beside: a loss besides that by g, of the same chunks.
    """
    clip, past = LocalSequence(layout, kernels), StreamState()
    for first in range(0, len(exits), of):
        group = exits[first : first + of]
        place = min(turn, len(group) - 1)
        for i, found in enumerate(group, first):
            if i and beside:
                with torch.no_grad():
                    beside.streams.remember(exits[i - 1].context, exits[i - 1].context_level)
            if found.history is not None:
                past = found.history
            elif i:
                past = _after(model, exits[i - 1], conditions, clip, past)
            if i == first + place:
                history, asked = past, beside and beside.streams.here()
        found = group[place]
        wanted = g[:, found.chunk.start : found.chunk.stop].detach()
        student = partial(_velocity, model, conditions, clip, history)
        flow = student(found.noisy, found.level, found.sigma)
        free = (found.level > 0)[:, :, None, None, None]
        clean = torch.where(free, clean_of(found.noisy, flow, found.sigma), found.clean)
        loss = (wanted * clean).sum()
        if beside and asked:
            loss = loss + beside.loss(found, flow, student, asked.velocity)
        yield loss if place == turn else 0.0 * loss


def _velocity(
    model: Model,
    conditions: Conditions,
    clip: WholeClip,
    past: StreamState,
    latents: Tensor,
    level: Tensor,
    sigma: float,
) -> Tensor:
    """Return a network's velocity of the chunk behind a past, at least fp32."""
    flow = model(latents, level, conditions, StreamingSequence(clip, past, remember=False))
    return flow.to(accumulation_dtype(flow.dtype))


@torch.no_grad()
def _after(
    model: Model, found: ChunkExit, conditions: Conditions, clip: WholeClip, past: StreamState
) -> StreamState:
    """Return the past behind a chunk, by the same pass as in its rollout."""
    sequence = StreamingSequence(clip, past)
    model(found.context, found.context_level, conditions, sequence)
    return sequence.after()
