"""Batches for training: the right clips in the right order, only this member's latent frames, read ahead in a thread.

What a batch holds is a function of (data set, seed, stage, step) and of which rows and latent frames are asked for. Nothing else is
state, so resuming is `start_step=`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.order import SampleOrder
from data_shards.read import ClipDataset
from data_shards.schema import ClipEntry, DataError, DatasetInfo


@dataclass(frozen=True)
class Batch:
    """`b` clips, `t` of their T latent frames. Poses and controls cover the whole cut and are the same on all context-parallel members.

    latents [b,t,C,h,w] float32, normalised; c2w [b,F,4,4] float32, metres, relative to the first raw frame of the cut, OpenCV axes;
    intrinsics [b,F,4] float32 fx, fy, cx, cy in pixels of (image_height, image_width), a pixel's centre at (column + 0.5, row + 0.5);
    controls [b,T,A] float32; draws [b] and valid_frames [b] (latent) int64; data_wait_s: how long the caller waited for this batch.
    text [b,L,E] float32 and text_mask [b,L] bool, True at real tokens: None in a data set without text.
    """

    latents: Tensor
    c2w: Tensor
    intrinsics: Tensor
    controls: Tensor
    keys: tuple[str, ...]
    draws: Tensor
    valid_frames: Tensor
    data_wait_s: float
    text: Tensor | None = None
    text_mask: Tensor | None = None


def _statistics(info: DatasetInfo, count: int, first_frame_index: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std), each [t, C, 1, 1], for the latent frames first_frame_index … of a clip."""
    kind = (np.arange(first_frame_index, first_frame_index + count) > 0).astype(np.int64)  # 0: the clip's first latent, 1: a later one
    mean, std = np.asarray(info.mean, np.float32)[kind], np.asarray(info.std, np.float32)[kind]
    return mean[:, :, None, None], std[:, :, None, None]


def normalise(latents: Any, info: DatasetInfo, first_frame_index: int = 0) -> Any:
    """[..., t, C, h, w] as the codec made them -> zero mean and unit variance per channel. Torch tensor or numpy array."""
    mean, std = _statistics(info, latents.shape[-4], first_frame_index)
    if isinstance(latents, Tensor):
        return (latents - torch.from_numpy(mean).to(latents)) / torch.from_numpy(std).to(latents)
    return (latents - mean) / std


def denormalise(latents: Any, info: DatasetInfo, first_frame_index: int = 0) -> Any:
    """The inverse of `normalise`: what the codec can decode. `first_frame_index` is the clip position of latents[..., 0, :, :, :]."""
    mean, std = _statistics(info, latents.shape[-4], first_frame_index)
    if isinstance(latents, Tensor):
        return latents * torch.from_numpy(std).to(latents) + torch.from_numpy(mean).to(latents)
    return latents * std + mean


def relative_poses(c2w: np.ndarray) -> np.ndarray:
    """[F,4,4] in any world -> in the frame of the first camera, which becomes the identity. Rigid inverse, in float64."""
    rotation, origin = c2w[0, :3, :3], c2w[0, :3, 3]
    world_to_first = np.eye(4)
    world_to_first[:3, :3], world_to_first[:3, 3] = rotation.T, -rotation.T @ origin
    return world_to_first @ c2w


def widen(stored: np.ndarray) -> Tensor:
    """Stored latents -> float32. uint16 is bfloat16. torch converts several times as fast as numpy."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(stored.copy()).float()


class ClipLoader:
    """Iterates over Batches, for ever. Use as a context manager or call close(): it owns a thread.

    Args:
        rows: which rows of each global batch this data-parallel member takes.
        frames: (start, stop) latent frames of the cut this context-parallel member holds; may be empty.
        clip_frames: T, latent frames in the cut. A stored clip may be longer; the cut starts at its latent 0.
        prefetch: batches read ahead.
        quarantined: names of shards to read nothing from; a draw that falls there takes another clip, all others stay. Every member of
            the run must be given the same names: they are state, like the step.
        replicated: False on all but one member of a context-parallel group: poses, intrinsics and controls are not read and come as NaN
            of the right shape, to be received from the member that read them.

    Raises:
        DataError: an empty split, a cut longer than some clip, rows or frames outside. While iterating: whatever the reader found.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        *,
        split: str = "train",
        seed: int,
        stage: int,
        global_batch: int,
        rows: range,
        frames: tuple[int, int],
        clip_frames: int,
        start_step: int = 0,
        prefetch: int = 2,
        quarantined: frozenset[str] = frozenset(),
        replicated: bool = True,
    ) -> None:
        self.clips = dataset.clips(split)
        if not len(self.clips):
            raise DataError(f"data: got an empty split {split!r}, expected clips ({dataset.path}). Fix: encode more episodes")
        if not 0 <= frames[0] <= frames[1] <= clip_frames:
            raise DataError(f"latent frames: got {frames}, expected a range inside 0:{clip_frames}")
        if rows.step != 1 or not 0 <= rows.start <= rows.stop <= global_batch:
            raise DataError(f"batch rows: got {rows}, expected a range inside 0:{global_batch}")
        shortest = self.clips[int(np.argmin(self.clips.latent_frames))]
        if clip_frames > shortest.latent_frames:
            raise DataError(
                f"clip length: got {clip_frames} latent frames, expected at most {shortest.latent_frames} as clip {shortest.key} has "
                f"({dataset.path}). Fix: frames={shortest.raw_frames} for this stage, or record longer clips"
            )
        self.dataset, self.order = dataset, SampleOrder(len(self.clips), seed, stage)
        self.global_batch, self.rows, self.frames, self.clip_frames = global_batch, rows, frames, clip_frames
        self.quarantined, self.replicated = quarantined, replicated
        if quarantined and all(clip.shard in quarantined for clip in self.clips):
            raise DataError(f"quarantine: got all shards of split {split!r} quarantined, expected clips left ({dataset.path})")
        self.step = start_step  # of the next batch to be handed out
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="clip-loader", daemon=True)
        self._thread.start()

    def make_batch(self, step: int) -> Batch:
        """The batch of a step, read now, in this thread."""
        info, draws = self.dataset.info, self.order.batch(step, self.global_batch, self.rows)
        entries = [self.clip_of(draw) for draw in draws]
        samples = [self._cut(entry) for entry in entries]
        raw = (self.clip_frames - 1) * info.temporal_stride + 1
        shapes = (
            (self.frames[1] - self.frames[0], info.channels, info.latent_height, info.latent_width),
            (raw, 4, 4),
            (raw, 4),
            (self.clip_frames, len(info.control_names)),
            (info.text_length, info.text_width),
            (info.text_length,),
        )
        # concatenating onto nothing keeps the shape when this member has no rows
        latents, c2w, intrinsics, controls, text, text_mask = (
            torch.from_numpy(np.concatenate([np.empty((0, *shape), np.float32), *(s[i][None] for s in samples)]))
            for i, shape in enumerate(shapes)
        )
        keys = tuple(entry.key for entry in entries)
        valid = torch.full((len(draws),), self.clip_frames, dtype=torch.int64)
        draw_tensor = torch.tensor(draws, dtype=torch.int64)
        texts = (text, text_mask > 0) if info.null_text else (None, None)
        return Batch(latents, c2w, intrinsics, controls, keys, draw_tensor, valid, 0.0, *texts)

    def clip_of(self, draw: int) -> ClipEntry:
        """The clip that this draw takes, past the quarantined shards."""
        entry, attempt = self.clips[self.order.sample(draw)], 0
        while entry.shard in self.quarantined:
            entry, attempt = self.clips[self.order.replacement(draw, attempt)], attempt + 1
        return entry

    def _cut(self, entry: ClipEntry) -> tuple[np.ndarray, ...]:
        """One clip cut to this loader's frames: latents [t,C,h,w], c2w [F,4,4], intrinsics [F,4], controls [T,A], text [L,E] and its mask
        [L] (L = E = 0 without text), all float32."""
        clip = self.dataset.read(entry, self.frames, self.replicated, stored=True)
        raw = (self.clip_frames - 1) * self.dataset.info.temporal_stride + 1
        latents = normalise(widen(clip.latents), self.dataset.info, self.frames[0]).numpy()
        if not self.replicated:
            info = self.dataset.info
            texts = ((info.text_length, info.text_width), (info.text_length,))
            shapes = ((raw, 4, 4), (raw, 4), (self.clip_frames, len(info.control_names)), *texts)
            return latents, *(np.full(shape, np.nan, np.float32) for shape in shapes)
        if clip.c2w is None or clip.intrinsics is None or clip.controls is None:
            raise DataError(f"clip: got no poses, intrinsics or controls, expected all (shard {entry.shard}, key {entry.key})")
        poses = relative_poses(clip.c2w[:raw]).astype(np.float32)
        text, mask = np.empty((0, 0), np.float32), np.empty(0, np.float32)
        if clip.text is not None and clip.text_mask is not None:
            text, mask = widen(clip.text).numpy(), clip.text_mask.astype(np.float32)
        return latents, poses, clip.intrinsics[:raw].astype(np.float32), clip.controls[: self.clip_frames].copy(), text, mask

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = self.make_batch(step)
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

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise DataError("loader: got a request after close(), expected none. Fix: make a new ClipLoader")
        started = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.step += 1
        return replace(item, data_wait_s=time.perf_counter() - started)

    def close(self) -> None:
        """Stop reading ahead and wait for the thread."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
