"""Cut a clip for training: this rank's latent frames normalised, poses and controls re-based.

A cut starts at the clip's latent 0, or at a later latent whose image latent was stored (see
data_shards/README.md); the image latent then replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.schema import IMAGE_LATENTS, TIME_SHARDED, ClipEntry, DatasetInfo
from data_shards.storage.read import REPLICATED, ClipDataset, check_finite


@dataclass(frozen=True)
class Conditions:
    """Store what all ranks of a context-parallel group need in full.

    c2w [F,4,4] float32 relative to the cut's first raw frame, intrinsics [F,4] float32, controls
    [T,A] float32, text [L,E] float32, text_mask [L] bool. None: the data set has none.
    """

    c2w: Tensor | None = None
    intrinsics: Tensor | None = None
    controls: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None


def statistics(
    info: DatasetInfo, count: int, first_frame_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (mean, std), each [t, C, 1, 1], for latent frames first_frame_index … of a clip."""
    # 0: the clip's first latent, 1: a later one
    kind = (np.arange(first_frame_index, first_frame_index + count) > 0).astype(np.int64)
    mean, std = np.asarray(info.mean, np.float32)[kind], np.asarray(info.std, np.float32)[kind]
    return mean[:, :, None, None], std[:, :, None, None]


def relative_poses(c2w: np.ndarray) -> np.ndarray:
    """Convert [F,4,4] from any world to the frame of the first camera, which becomes the identity.

    Rigid inverse, in float64.
    """
    rotation, origin = c2w[0, :3, :3], c2w[0, :3, 3]
    world_to_first = np.eye(4)
    world_to_first[:3, :3], world_to_first[:3, 3] = rotation.T, -rotation.T @ origin
    return world_to_first @ c2w


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
    if start and first == 0:
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
        # torch converts several times as fast as numpy
        out[at : at + high - low].copy_(as_tensor(stored))
        at += high - low
    mean, std = statistics(info, stop - first, first)
    out.sub_(torch.from_numpy(mean)).div_(torch.from_numpy(std))


def read_conditions(dataset: ClipDataset, entry: ClipEntry, start: int, count: int) -> Conditions:
    """Read the other members of the cut of `count` latent frames from latent `start` on.

    The controls of its first latent are those up to that raw frame; poses are relative to it.
    """
    members = dataset.members(entry)
    found = dataset.whole(entry, [members[field] for field in REPLICATED if field in members])
    stride = dataset.info.temporal_stride
    raw = slice(start * stride, start * stride + (count - 1) * stride + 1)
    given = {field.removesuffix(".npy"): array for field, array in found.items()}
    if "c2w" in given:
        given["c2w"] = relative_poses(given["c2w"][raw]).astype(np.float32)
    if "intrinsics" in given:
        given["intrinsics"] = given["intrinsics"][raw].astype(np.float32)
    if "controls" in given:
        given["controls"] = given["controls"][start : start + count].astype(np.float32)
    tensors = {
        name: as_tensor(array.copy() if not array.flags.writeable else array)
        for name, array in given.items()
    }
    if "text" in tensors:
        tensors["text"] = tensors["text"].float()
    if "text_mask" in tensors:
        tensors["text_mask"] = tensors["text_mask"].bool()
    return Conditions(**tensors)
