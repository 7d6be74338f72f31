"""Define a batch: tensors of several rows, each a clip or several packed clips.

It also merges the clips' conditions into those of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from data_shards.loading.cut import Conditions, statistics
from data_shards.schema import DatasetInfo
from data_shards.storage import read

# the same on all ranks of a context-parallel group
REPLICATED = tuple(field.removesuffix(".npy") for field in read.REPLICATED)


@dataclass(frozen=True)
class Batch:
    """Store `b` rows, and `t` of their T latent frames.

    Poses, controls and text cover the whole row and are the same on all context-parallel ranks.
    Each is None if the data has none.

    - latents [b,t,C,h,w] float32, normalised.
    - c2w [b,F,4,4] float32, metres, relative to the first raw frame of the cut, OpenCV axes.
    - intrinsics [b,F,4] float32 fx, fy, cx, cy in pixels of `image_size` (height, width), a pixel's
      centre at (column + 0.5, row + 0.5).
    - controls [b,T,A] float32; text [b,L,E] float32, text_mask [b,L] bool.
    - draws [b] and valid_frames [b] (latent) int64.
    - document_starts: per row, the start of each of its packed clips, (0,) for a row of one clip.
    - data_wait_s: how long the caller waited for this batch.

    A packed row has the raw frames of its clips one after another, (T_d - 1) r + 1 each; the last
    clip's poses are repeated over padding, and rows with fewer raw frames repeat their end.
    """

    latents: Tensor
    c2w: Tensor | None
    intrinsics: Tensor | None
    controls: Tensor | None
    text: Tensor | None
    text_mask: Tensor | None
    keys: tuple[str, ...]
    draws: Tensor
    valid_frames: Tensor
    document_starts: tuple[tuple[int, ...], ...]
    frames: int
    image_size: tuple[int, int]
    data_wait_s: float

    def each_tensor(
        self, change: Callable[[Tensor], Tensor], names: Sequence[str] | None = None
    ) -> Batch:
        """Return the batch with `change` applied to its tensors, or to those named."""
        chosen = names or [field.name for field in fields(self)]
        changed: dict[str, Any] = {
            n: change(value) for n in chosen if isinstance(value := getattr(self, n), Tensor)
        }
        return replace(self, **changed)


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


def absent(info: DatasetInfo, frames: int) -> Conditions:
    """Return NaN conditions of the right shapes, for a rank that does not read them.

    NaN shows at once if a value is used by mistake.
    """
    raw = (frames - 1) * info.temporal_stride + 1
    shapes = {
        "c2w": (raw, 4, 4),
        "intrinsics": (raw, 4),
        "controls": (frames, len(info.control_names)),
    }
    shapes |= {"text": (info.text_length, info.text_width)}
    room = {
        name: torch.full(shape, torch.nan)
        for name, shape in shapes.items()
        if f"{name}.npy" in info.fields
    }
    if "text_mask.npy" in info.fields:
        room["text_mask"] = torch.zeros(info.text_length, dtype=torch.bool)
    return Conditions(**room)


def joined(clips: Sequence[Conditions], frames: int, stride: int) -> Conditions:
    """Merge the conditions of a row's clips, one after another.

    Those of the last clip are repeated over the padding up to `frames` latents.
    """
    if len(clips) == 1 and (clips[0].controls is None or len(clips[0].controls) == frames):
        only = clips[0]
        raw = (frames - 1) * stride + 1
        if only.c2w is None or len(only.c2w) == raw:
            return only
    raw = frames * stride - len(clips) * (stride - 1)
    merged = {}
    for name, length in (("c2w", raw), ("intrinsics", raw), ("controls", frames)):
        parts = [part for clip in clips if (part := getattr(clip, name)) is not None]
        merged[name] = last_repeated(torch.cat(parts), length) if len(parts) == len(clips) else None
    return Conditions(**merged)


def last_repeated(tensor: Tensor, length: int) -> Tensor:
    """Extend [n, …] -> [length, …] by repeating the last entry."""
    missing = length - len(tensor)
    return (
        torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor
    )
