"""Make batches: tensors of several rows, each a clip or several packed one after another, from the
fields of clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_shards.fields import Field, batch_fields, field_named, row_entries
from data_shards.loading.cut import statistics, unread
from data_shards.schema import DatasetInfo
from data_shards.time_layout import TimeLayout, time_of


@dataclass(frozen=True)
class Batch:
    """Store `b` rows, and `t` of their T latent frames.

    - latents [b,t,C,h,w] float32, normalised.
    - fields: name -> [b, entries, …] as `data_shards.fields` describes it; absent if the data has
      none, and rows with fewer entries are padded. Fields that are read by row cover these t latent
      frames, all others the whole row, the same on all ranks of a sequence group.
    - draws [b] int64.
    - valid_frames: latent frames of each row before its padding.
    - document_starts: per row, the start of each of its packed clips, (0,) for a row of one clip.
    - image_size: (height, width) of the pixels that intrinsics refer to, a pixel's centre at
      (column + 0.5, row + 0.5).
    - data_wait_s: how long the caller waited for this batch.

    A packed row has the raw frames of its clips one after another, those of T_d latents each; the
    last clip's entries are repeated over padding.
    """

    latents: Tensor
    fields: Mapping[str, Tensor]
    keys: tuple[str, ...]
    draws: Tensor
    valid_frames: tuple[int, ...]
    document_starts: tuple[tuple[int, ...], ...]
    frames: int
    image_size: tuple[int, int]
    data_wait_s: float

    @property
    def c2w(self) -> Tensor | None:
        """Return [b,F,4,4] float32, metres, relative to the cut's first raw frame, OpenCV axes."""
        return self.fields.get("c2w")

    @property
    def intrinsics(self) -> Tensor | None:
        """Return [b,F,4] float32 fx, fy, cx, cy in pixels of `image_size`."""
        return self.fields.get("intrinsics")

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with its tensors changed."""
        changed: dict[str, Any] = {n: change(getattr(self, n)) for n in ("latents", "draws")}
        fields = {name: change(tensor) for name, tensor in self.fields.items()}
        return replace(self, **changed, fields=fields)

    def replicated(self) -> list[Tensor]:
        """Return the fields that one rank of a sequence group reads for all, in one order."""
        return [tensor for name, tensor in self.fields.items() if not field_named(name).by_row]

    def own_entries(self, held: tuple[int, int], time: TimeLayout) -> dict[str, Tensor]:
        """Return the fields of rows that are packed alike, without what padded them to the longest
        row of the whole batch. held: the latent frames of these `t`."""
        starts = self.document_starts[0] if self.document_starts else (0,)
        found = {}
        for name, tensor in self.fields.items():
            field, part = field_named(name), held if field_named(name).by_row else (0, self.frames)
            if field.rate != "clip":
                tensor = tensor[:, : row_entries(field.rate, starts, part, self.frames, time)]
            found[name] = tensor
        return found


def normalise(latents: Any, info: DatasetInfo, first_frame_index: int = 0) -> Any:
    """Normalise codec latents [..., t, C, h, w] to zero mean and unit variance per channel.

    Torch tensor or numpy array.
    """
    mean, std = statistics(info, latents.shape[-4], first_frame_index)
    if isinstance(latents, Tensor):
        return (latents - torch.from_numpy(mean).to(latents)) / torch.from_numpy(std).to(latents)
    return (latents - mean) / std


def denormalise(latents: Any, info: DatasetInfo, first_frame_index: int = 0) -> Any:
    """Revert `normalise`, so that the codec can decode.

    first_frame_index: the clip position of latents[..., 0, :, :, :].
    """
    mean, std = statistics(info, latents.shape[-4], first_frame_index)
    if isinstance(latents, Tensor):
        return latents * torch.from_numpy(std).to(latents) + torch.from_numpy(mean).to(latents)
    return latents * std + mean


def joined(
    clips: Sequence[Mapping[str, Tensor]],
    starts: tuple[int, ...],
    held: tuple[int, int],
    frames: int,
    time: TimeLayout,
) -> dict[str, Tensor]:
    """Return the fields of a row of `frames` latents: of its clips one after another, padded for
    the latents behind the last one. What is one for a whole clip stays in rows of one clip only.
    held: the latent frames of the row that this rank has."""
    row = {}
    for name, first in clips[0].items():
        field = field_named(name)
        if field.rate != "clip":
            part = held if field.by_row else (0, frames)
            length = row_entries(field.rate, starts, part, frames, time)
            whole = torch.cat([clip[name] for clip in clips]) if len(clips) > 1 else first
            row[name] = padded(whole, length, field)
        elif len(clips) == 1:
            row[name] = first
    return row


def stacked(
    rows: Sequence[Mapping[str, Tensor]],
    info: DatasetInfo,
    total: int,
    held: tuple[int, int],
    pin: bool = False,
) -> dict[str, Tensor]:
    """Return name -> [b, …] of the fields that every row of `total` latents has; of empty ones
    without rows. held: the latent frames of the rows that this rank has; pin: in page-locked
    memory."""
    found = {}
    for field in batch_fields():
        parts = [row[field.name] for row in rows if field.name in row]
        if field.member not in info.fields or len(parts) < len(rows):
            continue
        longest = max((len(part) for part in parts), default=0)
        if parts:
            whole = torch.stack([padded(part, longest, field) for part in parts])
        else:
            span = held if field.by_row else (0, total)
            length = row_entries(field.rate, (0,), span, total, time_of(info))
            whole = unread(field, info, length)[None][:0]
        found[field.name] = whole.pin_memory() if pin else whole
    return found


def padded(tensor: Tensor, length: int, field: Field) -> Tensor:
    """Extend [n, …] -> [length, …] by the field's padding."""
    missing, rest = length - len(tensor), tensor.shape[1:]
    if not missing:
        return tensor
    last = field.padding == "last"
    end = tensor[-1:].expand(missing, *rest) if last else tensor.new_zeros(missing, *rest)
    return torch.cat([tensor, end])
