"""Load batches for training: clips in the keyed order, only this rank's frames, read ahead.

A batch is a function of (data sets, seed, stage, step) and of the requested rows and latent frames.
The only other state is the names of quarantined shards, so resuming is `start_step=` and
`quarantined=`. Clips are read ahead in threads.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.fields import relative_poses, unlike
from data_shards.loading.batch import Batch, denormalise, joined, normalise, stacked
from data_shards.loading.cut import read_fields, read_latents
from data_shards.loading.schedule import Row, Schedule, ShortClip, Source, shares
from data_shards.schema import ClipEntry, DataError, ShardError
from data_shards.storage.read import ClipDataset
from data_shards.time_layout import time_of

__all__ = ["Batch", "ClipLoader", "denormalise", "normalise", "relative_poses"]


class ClipLoader:
    """Iterate over Batches without end. Use as a context manager or call close(), as it has
    threads.

    Args:
        dataset: its statistics normalise every clip, since its codec decodes; see `mixture`.
        rows: rows of each global batch for this data-parallel rank; with `cost`, as many rows of
            equal cost.
        frames: (start, stop) of the latent frames of a row for this context-parallel rank, may be
            empty; a function of T where T changes from step to step.
        stage: the stage's name, which with `seed` keys the order.
        clip_frames: T, the longest cut. A stored clip may be longer.
        shorter: further lengths that clips too short for T are cut to; each step has one length.
        mixture: data sets to draw from instead of `dataset` alone, by weight. They must share what
            `alike_in_mixture` lists, and the frame rate but for `mixed_rates`.
        pack: fill rows of T latent frames with several clips of any length up to T.
        cost: of a clip of so many latent frames; packed rows are then dealt so that all ranks have
            equally much to compute.
        prefetch: batches read ahead; readers: clips read at the same time.
        quarantined: `global_name`s of shards to read nothing from; a draw that falls there takes
            another clip, all others stay. Every rank must be given the same names: they are part of
            the training state, like the step.
        replicated: False on all but one rank of a sequence group: fields that are not read by row
            come as NaN of the right shape, to be received from the rank that read them.
        first_frame_only: read the latents of each clip's first frame and no others, which are NaN:
            for training on a model's own clips.
        pin: put tensors into page-locked memory, from which an accelerator copies without waiting.

    Raises:
        DataError: an empty split, a cut longer than some clip, rows or frames outside, data sets
            that do not fit together. While iterating: any error of the reader, a ShardError with
            its shard's `global_name`.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        split: str = "train",
        seed: int,
        stage: str,
        global_batch: int,
        rows: range,
        frames: tuple[int, int] | Callable[[int], tuple[int, int]],
        clip_frames: int,
        shorter: Sequence[int] = (),
        mixture: Mapping[ClipDataset, float] | None = None,
        mixed_rates: bool = False,
        pack: bool = False,
        cost: Callable[[int], float] | None = None,
        start_step: int = 0,
        prefetch: int = 2,
        readers: int = 1,
        quarantined: frozenset[str] = frozenset(),
        replicated: bool = True,
        first_frame_only: bool = False,
        pin: bool = False,
    ) -> None:
        self.dataset, self.datasets = dataset, tuple(mixture or {dataset: 1.0})
        self.tables = tuple(other.clips(split) for other in self.datasets)
        for other, table in zip(self.datasets, self.tables, strict=True):
            check_alike(dataset, other, mixed_rates)
            if not len(table):
                raise DataError(
                    f"data: got an empty split {split!r}, expected clips ({other.path}). Fix:"
                    " encode more episodes"
                )
        self._share = frames if callable(frames) else (lambda _: frames)
        for length in (clip_frames, *shorter):
            if not 0 <= self._share(length)[0] <= self._share(length)[1] <= length:
                raise DataError(
                    f"latent frames: got {self._share(length)}, expected a range inside 0:{length}"
                )
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= global_batch:
            raise DataError(f"batch rows: got {rows}, expected a range inside 0:{global_batch}")
        weights = [(mixture or {}).get(other, 1.0) for other in self.datasets]
        sources = [
            source_of(*given) for given in zip(self.datasets, self.tables, weights, strict=True)
        ]
        try:
            self.schedule = Schedule(
                sources, (clip_frames, *shorter), seed, stage, global_batch, pack
            )
        except ShortClip as error:
            clip, place = self.tables[error.source][error.clip], self.datasets[error.source].path
            raise DataError(
                f"clip length: got {error.wanted} latent frames, expected at most {error.frames} as"
                f" clip {clip.key} has ({place}). Fix: frames={clip.raw_frames} for this stage, a"
                " bucket of that length, or longer clips"
            ) from error
        self.global_batch, self.wanted, self.replicated, self.pin = (
            global_batch,
            rows,
            replicated,
            pin,
        )
        self._cost = cost if pack else None
        self._most = 1 if first_frame_only else clip_frames  # latents that are read of a clip
        self.quarantined = quarantined
        self.quarantined_clips = self._count_quarantined(split)
        self.step = start_step  # of the next batch to be handed out
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(readers, "clip-reader")
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(start_step,), name="clip-loader", daemon=True
        )
        self._thread.start()

    def make_batch(self, step: int, each: Callable[..., Any] = map) -> Batch:
        """Read the batch of a step now. each: maps the reading over rows."""
        rows = self.schedule.rows(
            step, self._mine(step), self._is_quarantined if self.quarantined else None
        )
        total = rows[0].frames if rows else self.schedule.frames
        start, stop = self._share(total)
        first = self.datasets[rows[0].takes[0].source].info if rows else self.dataset.info
        latents = self._empty(
            len(rows), stop - start, first.channels, first.latent_height, first.latent_width
        )
        of_rows: list[dict[str, Tensor]] = list(
            each(
                lambda place: self._read(rows[place], (start, stop), latents[place]),
                range(len(rows)),
            )
        )
        fields = stacked(of_rows, first, total, (start, stop), self.pin)
        keys = tuple(
            "+".join(self.entry(take.source, take.clip).key for take in row.takes) for row in rows
        )
        return Batch(
            latents,
            fields,
            keys=keys,
            draws=torch.tensor([row.draw for row in rows], dtype=torch.int64),
            valid_frames=tuple(row.valid_frames for row in rows),
            document_starts=tuple(row.starts for row in rows),
            frames=total,
            image_size=(first.image_height, first.image_width),
            data_wait_s=0.0,
        )

    def entry(self, source: int, clip: int) -> ClipEntry:
        return self.tables[source][clip]

    def _mine(self, step: int) -> Sequence[int]:
        """Return the rows of this data-parallel rank."""
        if self._cost is None or not len(self.wanted):
            return self.wanted
        rows = self.schedule.rows(step, range(self.global_batch))
        costs = [sum(self._cost(take.frames) for take in row.takes) for row in rows]
        return shares(costs, self.global_batch // len(self.wanted))[
            self.wanted.start // len(self.wanted)
        ]

    def _is_quarantined(self, source: int, clip: int) -> bool:
        return self.datasets[source].global_name(self.entry(source, clip).shard) in self.quarantined

    def _count_quarantined(self, split: str) -> int:
        """Return the number of clips of the split in quarantined shards."""
        total = 0
        for dataset, table in zip(self.datasets, self.tables, strict=True):
            names = [
                name.split("/", 1)[1]
                for name in self.quarantined
                if dataset.global_name(name.split("/", 1)[1]) == name
            ]
            count = table.in_shards(names) if names else 0
            if count == len(table):
                raise DataError(
                    f"quarantine: got all shards of split {split!r} quarantined, expected clips"
                    f" left ({dataset.path})"
                )
            total += count
        return total

    def _read(self, row: Row, held: tuple[int, int], out: Tensor) -> dict[str, Tensor]:
        """Put this member's frames of a row into `out` [t,C,h,w] and return the row's fields."""
        out[max(0, row.valid_frames - held[0]) :] = 0
        found = []
        for take, start in zip(row.takes, row.starts, strict=True):
            dataset, entry = self.datasets[take.source], self.entry(take.source, take.clip)
            low, high = max(held[0], start), min(held[1], start + take.frames)
            own = (low - start, high - start) if low < high else (0, 0)
            read = (own[0], min(own[1], self._most))
            out[max(start + read[1], low) - held[0] : max(low, high) - held[0]] = torch.nan
            try:
                if read[0] < read[1]:
                    part = out[low - held[0] : start + read[1] - held[0]]
                    buffer = self._buffer(part.numel())
                    read_latents(dataset, self.dataset.info, entry, take.start, read, part, buffer)
                fields = read_fields(
                    dataset, self.dataset.info, entry, take.start, take.frames, own, self.replicated
                )
            except ShardError as error:
                raise ShardError(
                    str(error), dataset.global_name(error.shard), error.passing
                ) from error
            found.append(fields)
        return joined(found, row.starts, held, row.frames, time_of(self.dataset.info))

    def _buffer(self, numbers: int) -> np.ndarray:
        """Return this thread's buffer for stored latents, reused from clip to clip."""
        if len(getattr(self._local, "buffer", ())) < 4 * numbers:
            self._local.buffer = np.empty(4 * numbers, np.uint8)
        return np.asarray(self._local.buffer)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, pin_memory=self.pin)

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self.make_batch(step, self._readers.map)
            except Exception as error:  # handed to the consumer, who raises it
                item = error
            step += 1
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __iter__(self) -> Iterator[Batch]:
        return self

    def ready(self, wait_s: float) -> bool:
        """Return whether a batch, or its error, is there; wait for it at most so long."""
        with self._queue.not_empty:
            return bool(
                self._queue.queue or self._queue.not_empty.wait(wait_s) or self._queue.queue
            )

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise DataError(
                "loader: got a request after close(), expected none. Fix: make a new ClipLoader"
            )
        started = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.step += 1
        return replace(item, data_wait_s=time.perf_counter() - started)

    def close(self, wait: bool = True) -> None:
        """Stop reading ahead, and wait for the threads unless told not to."""
        self._stop.set()
        if wait:
            self._thread.join()
        self._readers.shutdown(wait)

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def source_of(dataset: ClipDataset, table: Any, weight: float) -> Source:
    """Describe one split of a data set to the schedule."""
    info = dataset.info
    return Source(
        table.latent_frames,
        weight,
        (info.latent_height, info.latent_width),
        1 if info.time_layout == "grouped" else info.image_latents_every // info.temporal_stride,
    )


def check_alike(dataset: ClipDataset, other: ClipDataset, mixed_rates: bool) -> None:
    """Raise DataError unless two data sets can share one batch and one model."""
    for name in unlike(dataset.info, other.info, mixed_rates):
        mine, theirs = getattr(dataset.info, name), getattr(other.info, name)
        raise DataError(
            f"mixture: got {name} {theirs!r} in {other.path}, expected {mine!r} as in"
            f" {dataset.path} (key data.mixture). Fix: encode both alike, or leave one out"
        )
