"""Pass one micro-batch to an objective, and its losses back.

An objective is a function (model, clips, config) -> ObjectiveOutput, its configuration a dataclass
whose `builds` names it (wm_train/config/kinds.py); one of several networks is a function (networks
by role, clips, config, turn). It is under 100 lines, since `Clips` draws every
random number: keyed by seed, stage, purpose, draw and latent frame, never by where it runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallel.reference import Kernels
from parallel.sequence import WholeClip
from wm_train.conditioning import Conditions
from wm_train.config.roles import DistillConfig, Turn
from wm_train.noise import NoiseKey, normal, random_words, unit_interval
from wm_train.sampling.chunks import Rollouts


@dataclass(frozen=True)
class Clips:
    """Hold one micro-batch on this process.

    latents: normalised latents of the local frames, fp32 [B, t, C, h, w], t = T/P; draws: position
    of each clip in the stage's global sample stream, int64 [B] on the device of the latents;
    conditions: of the whole clips; sequence: the sequence shard, whose layout is of whole clips.
    """

    latents: Tensor
    draws: Tensor
    conditions: Conditions
    sequence: WholeClip
    key: NoiseKey

    def normal(self, purpose: str) -> Tensor:
        """Return standard normals of the latents' shape, [B, t, C, h, w], a function of draw and
        latent frame."""
        return normal(self.key, purpose, self.draws, self._local, self.latents.shape[2:])

    def uniform(self, purpose: str, per: Literal["clip", "frame", "chunk"] = "clip") -> Tensor:
        """Return uniform numbers in (0, 1), fp32: [B] per clip; [B, t] per latent frame, or the
        same for all frames of a chunk."""
        if per == "frame":
            words = random_words(self.key, purpose, self.draws, self._local, 1)
            return unit_interval(words[:, :, 0, 0])
        chunks = len(self.sequence.layout.chunk_starts) if per == "chunk" else 1
        values = unit_interval(
            random_words(self.key, purpose, self.draws, (0, chunks), 1)[:, :, 0, 0]
        )
        return values[:, 0] if per == "clip" else values[:, self.chunk_index()]

    def chunk_index(self) -> Tensor:
        """Return the number of the chunk of each local frame, int64 [t]."""
        starts, (first, stop) = self.sequence.layout.chunk_starts, self._local
        index = [bisect_right(starts, frame) - 1 for frame in range(first, stop)]
        return torch.tensor(index, dtype=torch.int64, device=self.latents.device)

    @property
    def _local(self) -> tuple[int, int]:
        return self.sequence.frames.start, self.sequence.frames.stop


@dataclass(frozen=True)
class ObjectiveOutput:
    """Hold the losses of one micro-batch.

    loss: one number per clip, [B], the mean over the whole clip, equal on all processes that
    share it; metrics: name -> [B]. pieces: losses whose gradients together, summed over processes,
    are that of the clips' summed loss; each is a scalar, taken and back-propagated one by one, so
    that only one is in memory; None: `loss` itself is back-propagated. count: how many pieces.
    direction: sum over local frames of a student's gradient, [B, C], which turns compare.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    pieces: Iterable[Tensor] | None = None
    count: int = 0
    direction: Tensor | None = None


@dataclass(frozen=True)
class RoleTurn:
    """Hold what an objective of several networks needs besides clips: whose turn it is, and how
    each network sees the clips.

    sequences: role -> the local frames in the layout of that network's chunks; first_latent:
    [B, C, h, w], frame 0 of each clip on every process; kernels: of the device, for rollouts; made:
    the clips' rollouts, where they were made ahead; clean_first: whether networks take frame 0
    clean, and not by their conditions.
    """

    turn: Turn
    distill: DistillConfig
    sequences: Mapping[str, WholeClip]
    first_latent: Tensor
    kernels: Kernels
    made: Rollouts | None = None
    clean_first: bool = True
