"""Cut a clip for training: this rank's latent frames normalised, fields sliced and re-based.

A cut starts at the clip's latent 0, or, of a causal codec, at a later latent whose image latent was
stored (see data_shards/README.md), which then replaces it; of a grouped codec at any latent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.fields import Field, batch_fields, entries_of
from data_shards.schema import IMAGE_LATENTS, TIME_SHARDED, ClipEntry, DatasetInfo
from data_shards.storage.read import ClipDataset, check_finite
from data_shards.time_layout import time_of


def statistics(
    info: DatasetInfo, count: int, first_frame_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean, std), each [t, C, 1, 1], for latent frames first_frame_index … of a clip."""
    kind = (np.arange(first_frame_index, first_frame_index + count) > 0).astype(
        np.int64
    )  # 0: the clip's first latent, 1: a later one
    mean, std = np.asarray(info.mean, np.float32)[kind], np.asarray(info.std, np.float32)[kind]
    return mean[:, :, None, None], std[:, :, None, None]


def as_tensor(stored: NDArray[Any]) -> Tensor:
    """Return stored numbers as a tensor on the same memory; uint16 is bfloat16."""
    return (
        torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        if stored.dtype == np.uint16
        else torch.from_numpy(stored)
    )


def read_latents(
    dataset: ClipDataset,
    info: DatasetInfo,
    entry: ClipEntry,
    start: int,
    frames: tuple[int, int],
    out: Tensor,
    buffer: NDArray[np.uint8],
) -> None:
    """Read latent frames [frames[0], frames[1]) of the cut that starts at latent `start`.

    They are normalised with the statistics of `info` into `out` [t, C, h, w] float32. Only their
    bytes are read. buffer: memory for the stored bytes, kept by the caller.
    """
    first, stop = frames
    if first >= stop:
        return
    members = dataset.members(entry)
    pieces = [(members[TIME_SHARDED], start + first, start + stop)]
    if start and first == 0 and dataset.info.time_layout == "causal":
        row = start * dataset.info.temporal_stride // dataset.info.image_latents_every - 1
        pieces = [
            (members[IMAGE_LATENTS], row, row + 1),
            (members[TIME_SHARDED], start + 1, start + stop),
        ]
    at = 0
    for member, low, high in pieces:
        if low == high:
            continue
        stored = dataset.rows(entry, member, low, high, buffer)
        check_finite(stored, entry, member, (low, high))
        out[at : at + high - low].copy_(
            as_tensor(stored)
        )  # torch converts several times as fast as numpy
        at += high - low
    mean, std = statistics(info, stop - first, first)
    out.sub_(torch.from_numpy(mean)).div_(torch.from_numpy(std))


def read_fields(
    dataset: ClipDataset,
    info: DatasetInfo,
    entry: ClipEntry,
    start: int,
    count: int,
    own: tuple[int, int],
    replicated: bool = True,
) -> dict[str, Tensor]:
    """Read the fields of the cut of `count` latent frames from latent `start` on: name -> tensor of
    the field's batch type, entries first, relative to the cut where the field asks for it, and
    divided by what `info` states, or normalised as latents.

    own: the latent frames of the cut that this rank holds, maybe none; of a field that is read by
    row it gets theirs. replicated: False leaves the others unread, as `unread` has them.
    """
    members, time = dataset.members(entry), time_of(dataset.info)
    present = [field for field in batch_fields() if field.member in members]
    wanted = [field for field in present if replicated or field.by_row]
    stored = dataset.fields_of(entry, wanted, start, own)
    found = {}
    for field in present:
        first, stop = entries_of(field.rate, (0, count), time)
        if field.name not in stored:
            found[field.name] = unread(field, info, stop - first)
            continue
        array = stored[field.name]
        if field.rate != "clip" and not field.by_row:
            origin = start * (time.stride if field.rate == "raw" else 1)
            array = array[origin + first : origin + stop]
        if field.rebase is not None:
            array = field.rebase(array)
        array = array if array.flags.writeable else array.copy()
        found[field.name] = as_tensor(array).to(tensor_type(field))
        if field.divisor and (divisor := getattr(info, field.divisor)):
            found[field.name] /= torch.tensor(divisor, dtype=tensor_type(field))
        if field.latents:
            mean, std = statistics(info, len(found[field.name]), 0)
            found[field.name].sub_(torch.from_numpy(mean)).div_(torch.from_numpy(std))
    return found


def tensor_type(field: Field) -> torch.dtype:
    """Return the type of a field's tensors in a batch."""
    return getattr(torch, str(field.tensor))


def unread(field: Field, info: DatasetInfo, entries: int) -> Tensor:
    """Return room for a field that another rank reads: NaN where its type has it, so that nobody
    takes it for what it stands for."""
    shape, dtype = field.tensor_shape(info, entries), tensor_type(field)
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype)
