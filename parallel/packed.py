"""Denoise every frame of a clip in one pass, each with the clean frames before it as its past.

Source: Waypoint-1.5 §4, sequence-packed teacher forcing. A clean and a noisy copy of each frame
stand side by side (`ClipLayout.copies`): clean copies see clean ones, a noisy copy sees its own
chunk's noisy copies and the clean ones of all other frames that the mask shows. That is what a
chunk sees that is denoised after the others in a stream. Clean copies take no gradient, so they
pass first and alone: `CleanPass` keeps their keys and values, each rank its own frames', and
`NoisyPass`, which alone is back-propagated, puts them beside its own. Frames meet in attention
alone; scans and halos are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
from torch import Tensor

from parallel.calls import Calls
from parallel.comm import Communicator
from parallel.gdn_scan import Reverse, ScanOutput
from parallel.halo import Taps
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import FULL, AttentionMask
from parallel.reference import Kernels, Stream
from parallel.sequence import Cache, HaloEdges, Recompute, WholeClip, as_autocast

Keys = tuple[Tensor, Tensor]  # of the local frames, [B, T/P, S, H_kv, D] each


class _Half:
    """Run the verbs over one copy of each frame; a model sees the layout of single frames."""

    def __init__(self, clip: WholeClip) -> None:
        self._clip = clip

    @property
    def layout(self) -> ClipLayout:
        return self._clip.layout

    @property
    def clip_frames(self) -> int:
        return self._clip.clip_frames

    @property
    def recompute(self) -> Recompute:
        return self._clip.recompute

    @property
    def comm(self) -> Communicator:
        return self._clip.comm

    @property
    def kernels(self) -> Kernels:
        return self._clip.kernels

    @property
    def frames(self) -> FrameRange:
        return self._clip.frames

    @property
    def positions(self) -> Tensor:
        return self._clip.positions

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        _refuse("a scan")

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        _refuse("a convolution over time")

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        return self._clip.mean(value, weight)

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._clip.gather(tensors)


class CleanPass(_Half):
    """Run the verbs over the clean frames, and keep their keys and values for a `NoisyPass`. Run it
    without gradients."""

    def __init__(self, clip: WholeClip) -> None:
        super().__init__(clip)
        self.kept: list[Keys] = []

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return attention among clean frames, q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D]."""
        assert cache is None, "the pass holds all frames"
        q, k, v = as_autocast(q, k, v)
        self.kept.append((k.detach(), v.detach()))
        return self._clip.attend(q, k, v, mask)

    def rewind(self) -> AbstractContextManager[None]:
        return self._clip.rewind()


class NoisyPass(_Half):
    """Run the verbs over the noisy frames, beside the clean ones of a `CleanPass`."""

    def __init__(self, clip: WholeClip, clean: Sequence[Keys]) -> None:
        super().__init__(clip)
        self._both = clip.relaid(clip.layout.copied(2, clean_given=True))
        self._clean, self._calls = clean, Calls()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return attention of noisy frames, q [B, T/P, S, H, D], k, v [B, T/P, S, H_kv, D]."""
        assert cache is None, "the pass holds all frames"
        call = self._calls.next()
        if call >= len(self._clean):
            raise ValueError(
                f"packed pass failed: got verb call {call + 1}, expected {len(self._clean)} as in"
                " the pass over the clean frames (NoisyPass). Fix: both passes of one model"
            )
        q, k, v = as_autocast(q, k, v)
        keys, values = self._clean[call]
        none = torch.zeros_like(q)
        both = self._both.attend(_beside(none, q), _beside(keys, k), _beside(values, v), mask)
        return both[:, 1::2]

    def rewind(self) -> AbstractContextManager[None]:
        return self._calls.rewind()


def _beside(clean: Tensor, noisy: Tensor) -> Tensor:
    """Return [B, T/P, …] twice -> [B, 2·T/P, …], the clean copy of each frame before the noisy
    one."""
    return torch.stack((clean, noisy), dim=2).flatten(1, 2)


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"packed pass failed: got {what}, expected attention alone, as a noisy frame has no place"
        " in a recurrence over clean ones (key distill.gradient). Fix: distill.gradient=late"
    )
