"""Run the verbs of a sequence for a batch whose rows hold different packed documents.

All that rows do alone (projections, norms, feed-forward layers) then runs once for the whole batch,
and sharded weights are gathered once; only the verbs, which know documents, run row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from parallel.comm import Communicator
from parallel.gdn_scan import Reverse, ScanOutput
from parallel.halo import Taps
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import FULL, AttentionMask
from parallel.reference import Kernels, Stream
from parallel.sequence import Cache, HaloEdges, Recompute, WholeClip


class RowsSequence:
    """Join the sequence shards of single rows, one for each row of a batch, in order.

    Every row has the same frames on this rank; documents, chunks and padding are each row's own.
    So there is no common `layout`: reading it raises ValueError.
    """

    def __init__(self, rows: Sequence[WholeClip]) -> None:
        """Store the rows' shards. Raises ValueError if they do not have the same frames."""
        spans = {(row.clip_frames, row.frames) for row in rows}
        if len(spans) != 1:
            raise ValueError(
                f"rows do not fit together: got {sorted((n, r.start, r.stop) for n, r in spans)} as"
                " (frames, own start, own stop), expected one for all rows (RowsSequence)"
            )
        self.rows = tuple(rows)

    @property
    def layout(self) -> ClipLayout:
        raise self._apart("one layout")

    @property
    def clip_frames(self) -> int:
        return self.rows[0].clip_frames

    @property
    def frames(self) -> FrameRange:
        return self.rows[0].frames

    @property
    def recompute(self) -> Recompute:
        return self.rows[0].recompute

    @property
    def comm(self) -> Communicator:
        return self.rows[0].comm

    @property
    def kernels(self) -> Kernels:
        return self.rows[0].kernels

    @property
    def positions(self) -> Tensor:
        """Return the time index of each local frame of each row, [B, T/P] int64 on the CPU."""
        return torch.cat([row.positions for row in self.rows])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask = FULL,
        cache: Cache | None = None,
    ) -> Tensor:
        if cache is not None:
            raise self._apart("a stream")
        each = zip(self.rows, q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([row.attend(a, b, c, mask) for row, a, b, c in each])

    def scan(
        self,
        streams: Sequence[Stream],
        reverse: Reverse = "exclusive",
        initial: Sequence[Tensor] | None = None,
    ) -> ScanOutput:
        raise self._apart("a scan")

    def halo(
        self, tensors: Sequence[Tensor], before: int, after: int, edges: HaloEdges = "clip"
    ) -> list[Taps]:
        raise self._apart("a halo")

    def mean(self, value: Tensor, weight: Tensor) -> Tensor:
        each = zip(self.rows, value.split(1), weight.split(1), strict=True)
        return torch.cat([row.mean(x, w) for row, x, w in each])

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        each = zip(self.rows, *(x.split(1) for x in tensors), strict=True)
        found = [row.gather(own) for row, *own in each]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def rewind(self) -> AbstractContextManager[None]:
        return nullcontext()  # every call stands alone

    def part(self, frames: FrameRange) -> WholeClip:
        raise self._apart("a part of the frames")

    def relaid(self, layout: ClipLayout) -> WholeClip:
        raise self._apart("another layout")

    def _apart(self, what: str) -> ValueError:
        return ValueError(
            f"{what} was asked of {len(self.rows)} rows with documents of their own, expected"
            " attention, means, positions and clip_frames alone (RowsSequence). Fix:"
            " mixed_documents=False for the model or objective, so that rows go one by one"
        )
