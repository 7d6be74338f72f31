"""Read a batch of clips that are named, not drawn: what a job needs that goes through a data set
once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_shards.loading.batch import Batch, joined, stacked
from data_shards.loading.cut import read_fields, read_latents
from data_shards.schema import ClipEntry
from data_shards.storage.read import ClipDataset
from data_shards.time_layout import time_of


def read_batch(
    dataset: ClipDataset,
    clips: Sequence[ClipEntry],
    frames: int,
    held: tuple[int, int],
    draws: Sequence[int],
    replicated: bool = True,
) -> Batch:
    """Return the first `frames` latent frames of these clips as a batch, as `ClipLoader` makes one.

    held: the latent frames [start, stop) that this rank has; draws: the clips' numbers, int64;
    replicated: False leaves out the fields that one rank of a sequence group reads for all.

    Raises:
        DataError: bytes that are damaged or cannot be read.
    """
    info, (start, stop) = dataset.info, held
    shape = (info.channels, info.latent_height, info.latent_width)
    latents, rows = torch.zeros(len(clips), stop - start, *shape), []
    buffer = np.empty(4 * latents[:1].numel(), np.uint8)
    for place, clip in enumerate(clips):
        read_latents(dataset, info, clip, 0, held, latents[place], buffer)
        fields = read_fields(dataset, info, clip, 0, frames, held, replicated)
        rows.append(joined([fields], (0,), held, frames, time_of(info)))
    return Batch(
        latents,
        stacked(rows, info, frames, held),
        keys=tuple(clip.key for clip in clips),
        draws=torch.tensor(draws, dtype=torch.int64),
        valid_frames=(frames,) * len(clips),
        document_starts=((0,),) * len(clips),
        frames=frames,
        image_size=(info.image_height, info.image_width),
        data_wait_s=0.0,
    )
