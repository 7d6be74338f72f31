"""Run the verbs one chunk at a time, with the past in a state of constant size.

Source: SANA-WM §3.2, chunk-causal inference; §5.4. Frames interact only in the verbs of a
`SequenceShard`, so a streaming model is the same model with another implementation of the verbs:
`StreamingSequence` covers the frames of one chunk and takes the past from what earlier chunks
stored. It stores per verb call, in the order of the calls of a forward pass: the recurrent states
of a scan, the last frames of a convolution, and for attention the keys and values of the sink
frames and of the window. One device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.gdn_scan import Reverse, ScanOutput
from parallel.halo import Taps
from parallel.layout import ClipLayout
from parallel.masks import FULL, AttentionMask
from parallel.reference import REFERENCE, Kernels, Stream
from parallel.sequence import HaloEdges, LocalSequence


@dataclass(frozen=True)
class Past:
    """Store what one verb call must remember of earlier chunks.

    tensors: states of a scan or frames of a convolution. For attention: sink, the (keys, values) of
    the sink frames that have left the window, and window, one such pair per chunk of the window.
    """

    tensors: tuple[Tensor, ...] = ()
    sink: tuple[tuple[Tensor, Tensor], ...] = ()
    window: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class StreamState:
    """Store everything that a rollout carries from chunk to chunk.

    frames: latent frames done. The empty state starts a video.
    """

    frames: int = 0
    calls: tuple[Past, ...] = ()

    def elements(self) -> int:
        """Return the number of stored elements, over all calls."""
        pairs = [
            x
            for past in self.calls
            for kept in (past.sink, past.window)
            for pair in kept
            for x in pair
        ]
        return sum(x.numel() for past in self.calls for x in past.tensors) + sum(
            x.numel() for x in pairs
        )


@dataclass
class StreamingSequence:
    """Run the verbs for the chunk that starts at `state.frames`.

    Make one for each forward pass; `after()` returns the state behind it. layout: the whole clip,
    with its chunk starts. A pass whose `after()` is not used (a denoising step) has no effect.
    """

    layout: ClipLayout
    state: StreamState
    kernels: Kernels = REFERENCE
    _left: list[Past] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.layout.document_starts != (0,) or self.layout.ragged:
            raise ValueError(
                f"streaming failed: got documents {self.layout.document_starts} and valid_frames"
                f" {self.layout.valid_frames}, expected one document without padding"
                " (StreamingSequence). Fix: roll documents out one by one"
            )
        if self.state.frames not in self.layout.chunk_starts:
            raise ValueError(
                f"streaming failed: got a state after {self.state.frames} frames, expected a chunk"
                f" start of {self.layout.chunk_starts} (StreamingSequence). Fix: keep one layout"
                " for the whole rollout"
            )
        self.frames = self.layout.chunk_of(self.state.frames)
        self._alone = LocalSequence(ClipLayout(len(self.frames)), self.kernels)

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.frames.start, self.frames.stop, dtype=torch.int64)[None]

    def after(self) -> StreamState:
        """Return the state that includes this chunk; call it after the forward pass."""
        return StreamState(self.frames.stop, tuple(self._left))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask = FULL) -> Tensor:
        """Return attention over the visible chunks: q [B, t, S, H, D], k, v [B, t, S, H_kv, D]."""
        if mask.causality != "chunk":
            raise ValueError(
                f"streaming failed: got {mask.causality} attention, expected chunk-causal, or the"
                " past would have to see the future (key model.causal). Fix: model.causal=true"
            )
        past = self._past()
        cache = None
        if kept := [*past.sink, *past.window]:
            keys, values = zip(*kept, strict=True)
            cache = torch.cat(keys, dim=1), torch.cat(values, dim=1)
        out = self._alone.attend(q, k, v, FULL, cache)
        sink, window = past.sink, (*past.window, (k, v))
        while mask.window is not None and len(window) >= mask.window:
            # the sink frames of the chunk that leaves the window
            first = self.frames.stop - sum(pair[0].shape[1] for pair in window)
            (k, v), window = window[0], window[1:]
            if first < mask.sink:
                sink = (
                    *sink,
                    (k[:, : mask.sink - first].clone(), v[:, : mask.sink - first].clone()),
                )
        self._left.append(Past(sink=sink, window=window))
        return out

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        """Continue the forward recurrence from the last chunk; reverse sees this chunk only."""
        assert initial is None, "a streaming scan has its own initial state"
        past = self._past().tensors
        start = past or [
            stream.update.new_zeros(stream.update.shape[0], *stream.update.shape[2:])
            for stream in streams
        ]
        out = self._alone.scan(streams, reverse, start)
        self._left.append(Past(tuple(out.final)))
        return out

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        """Return taps whose past comes from earlier chunks and whose future is zero."""
        past = self._past().tensors
        t, taps, tails = len(self.frames), [], []
        for i, x in enumerate(tensors):
            tail = past[i] if past else x.new_zeros(x.shape[0], before, *x.shape[2:])
            extended = torch.cat([tail, x, x.new_zeros(x.shape[0], after, *x.shape[2:])], dim=1)
            taps.append(Taps(extended, before, t))
            tails.append(extended[:, t : t + before])
        self._left.append(Past(tuple(tails)))
        return taps

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean over this chunk."""
        return self._alone.mean(value, weight)

    def _past(self) -> Past:
        """Return what the same call of the last chunk's forward pass stored."""
        call = len(self._left)
        return self.state.calls[call] if self.state.calls else Past()


def chunk_starts(frames: int, chunk_frames: int) -> tuple[int, ...]:
    """Return the first frames of the chunks of a clip.

    The first chunk has one frame more (the image), as in the public layout `first_chunk_plus_one`:
    frames 11, chunk_frames 3 -> (0, 4, 7, 10). chunk_frames 0: one chunk, bidirectional.
    """
    return (0, *range(chunk_frames + 1, frames, chunk_frames)) if chunk_frames else (0,)
