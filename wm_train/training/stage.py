"""One stage on one process: data set, mesh and shapes, opened together and checked against each
other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from data_shards.loading.load import Batch, ClipLoader
from data_shards.schema import latent_frame_count
from data_shards.storage.read import ClipDataset, open_dataset, select_clips
from data_shards.storage.remote import RangeCache, RetryPolicy
from parallel.degrees import MeshDegrees
from parallel.engines import AttentionEngine, make_engine
from parallel.layout import ClipLayout
from parallel.mesh import Mesh, build_mesh
from parallel.reference import Kernels
from parallel.sequence import SequenceShard, make_sequence
from parallel.streaming import chunk_starts
from wm_train.backends import Backend
from wm_train.checks.mesh import valid_worlds
from wm_train.conditioning import Conditions
from wm_train.config.schema import DataConfig, RunConfig, StageConfig
from wm_train.models.flops import FORWARDS_PER_STEP, Flops, forward_flops, frame_pairs
from wm_train.noise import NoiseKey
from wm_train.training.feed import Feed
from wm_train.training.state import SetupError
from wm_train.world import World

TEXT = ("text", "text_mask")


@dataclass(frozen=True)
class Stage:
    """One stage on this process: what does not change from step to step."""

    run: RunConfig
    config: StageConfig
    backend: Backend
    world: World
    mesh: Mesh
    dataset: ClipDataset
    mixture: dict[ClipDataset, float]  # what training draws from, by weight
    latent_frames: int  # T, the longest
    noise: NoiseKey
    null_text: Tensor | None  # [L0, E] on the device; None: the model takes no text
    kernels: Kernels  # of this device, as backend.kernels and backend.attention ask
    attention: (
        tuple[str, AttentionEngine] | None
    )  # an engine of others for the softmax blocks; None: ours
    flops: dict[int, Flops]  # tokens of a latent frame -> forward, of one clip of T latent frames

    @property
    def data_fingerprint(self) -> str:
        """Of everything that decides which samples training sees in which order, besides seed and
        batch."""
        data = self.run.data
        if list(self.mixture) == [self.dataset] and not data.buckets and not data.pack:
            return self.dataset.fingerprint
        parts = [[dataset.fingerprint, weight] for dataset, weight in self.mixture.items()]
        return hashlib.sha256(
            json.dumps([self.dataset.fingerprint, parts, data.buckets, data.pack]).encode()
        ).hexdigest()

    def clip_flops(self, latent_frames: int, tokens_per_frame: int) -> float:
        """Forward FLOPs of a clip: attention grows with the pairs of frames that see each other,
        the rest with its length."""
        share, whole = latent_frames / self.latent_frames, self.flops[tokens_per_frame]
        pairs, all_pairs = (
            frame_pairs(self.run.model, n, self.config.chunk_frames)
            for n in (latent_frames, self.latent_frames)
        )
        return (whole.dense + whole.gdn) * share + whole.softmax * pairs / all_pairs

    def work(self, batch: Batch) -> dict[str, float]:
        """What a training step does for the clips of this batch, padding left out: `frames` (raw),
        `latent_frames`, `tokens`, `flops`. Of clips that a sequence group holds together it is this
        member's part, so the sums over all processes are the step's."""
        stride, members, (height, width) = (
            self.dataset.info.temporal_stride,
            self.mesh.sequence_size,
            batch.latents.shape[-2:],
        )
        size = tokens_per_frame(self.run, height, width)
        rows = zip(batch.document_starts, batch.valid_frames.tolist(), strict=True)
        clips = [end - start for starts, last in rows for start, end in pairwise((*starts, last))]
        whole = {
            "frames": sum((length - 1) * stride + 1 for length in clips),
            "latent_frames": sum(clips),
            "tokens": sum(clips) * size,
            "flops": FORWARDS_PER_STEP * sum(self.clip_flops(length, size) for length in clips),
        }
        return {name: amount / members for name, amount in whole.items()}


def open_stage(run: RunConfig, backend: Backend, world: World) -> Stage:
    """The data set, the mesh and the shapes of this stage, checked against each other."""
    config = run.recipe.stages[run.stage]
    try:
        kernels = backend.kernels(backend.device, run.backend.kernels, run.backend.attention)
    except ValueError as error:
        raise SetupError(str(error)) from error
    dataset, mixture = open_data(run.data)
    degrees = MeshDegrees.from_config(run.parallel, world.size, run.model.heads)
    mesh = build_mesh(
        degrees, backend.device.type, timedelta(seconds=run.backend.collective_timeout_s)
    )
    if config.global_batch % mesh.data_size:
        nearest = mesh.data_size * max(1, config.global_batch // mesh.data_size)
        raise SetupError(
            f"batch: got global_batch {config.global_batch}, expected a multiple of the"
            f" {mesh.data_size} data-parallel members (key recipe.stages.{run.stage}.global_batch)."
            f" Fix: global_batch={nearest}, or one of {valid_worlds(run, config.global_batch)}"
            " workers"
        )
    share = config.global_batch // mesh.data_size
    if run.trainer.accumulate > share:
        raise SetupError(
            f"batch: got trainer.accumulate {run.trainer.accumulate}, expected at most the {share}"
            f" clips of one process. Fix: trainer.accumulate={share}"
        )
    frames = latent_frame_count(config.frames, dataset.info.temporal_stride)
    sizes = {
        tokens_per_frame(run, other.info.latent_height, other.info.latent_width)
        for other in (dataset, *mixture)
    }
    text = dataset.info.text_length if run.model.text_width else 0
    flops = {
        size: forward_flops(run.model, frames, size, text, config.chunk_frames) for size in sizes
    }
    engine = make_engine(run.parallel.attention, mesh.comm)
    null = dataset.null_text() if run.model.text_width else None
    null_text = None if null is None else torch.from_numpy(null).to(backend.device)
    noise = NoiseKey(run.seed, run.stage)
    return Stage(
        run,
        config,
        backend,
        world,
        mesh,
        dataset,
        mixture,
        frames,
        noise,
        null_text,
        kernels,
        engine,
        flops,
    )


def tokens_per_frame(run: RunConfig, latent_height: int, latent_width: int) -> int:
    """S of latents of this size."""
    return latent_height * latent_width // run.model.patch_size**2


def open_data(data: DataConfig) -> tuple[ClipDataset, dict[ClipDataset, float]]:
    """The data set of `data.path`, and what training draws from by weight."""
    policy = RetryPolicy(budget_s=data.retry_s)
    cache = RangeCache(Path(data.cache), round(data.cache_gb * 1e9)) if data.cache else None
    found = {
        path: open_dataset(path, policy=policy, cache=cache)
        for path in dict.fromkeys([data.path, *data.mixture])
    }
    for file in data.selection:
        select_clips(list(found.values()), file)
    return found[data.path], {
        found[path]: weight for path, weight in (data.mixture or {data.path: 1.0}).items()
    }


def open_loader(
    stage: Stage,
    split: str,
    global_batch: int,
    first_step: int = 0,
    quarantined: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Feed:
    """This process's rows and frames of the global batches from `first_step` on; of the held-out
    split always whole cuts of `data.path`."""
    each, data, training = global_batch // stage.mesh.data_size, stage.run.data, split == "train"
    info, pack = stage.dataset.info, stage.run.data.pack and split == "train"
    packed = next(iter(stage.mixture)).info
    packed_size = tokens_per_frame(stage.run, packed.latent_height, packed.latent_width)

    def frames(length: int) -> tuple[int, int]:
        share = stage.mesh.frames(length)
        return share.start, share.stop

    def loader(step: int, names: frozenset[str]) -> ClipLoader:
        return ClipLoader(
            stage.dataset,
            split=split,
            seed=stage.run.seed,
            stage=stage.noise.stage,
            global_batch=global_batch,
            rows=range(stage.mesh.data_index * each, (stage.mesh.data_index + 1) * each),
            frames=frames,
            clip_frames=stage.latent_frames,
            shorter=(
                [
                    latent_frame_count(n, info.temporal_stride)
                    for n in data.buckets
                    if n < stage.config.frames
                ]
                if training
                else []
            ),
            mixture=stage.mixture if training else None,
            pack=pack,
            cost=lambda length: stage.clip_flops(
                length, packed_size
            ),  # with packing there is one size only
            start_step=step,
            prefetch=data.prefetch,
            readers=data.readers,
            quarantined=names,
            replicated=stage.mesh.sequence_index == 0,
            pin="pinned" in stage.backend.capabilities,
        )

    return Feed(loader, data, stage.world, first_step, quarantined, report)


def sequence_of(stage: Stage, batch: Batch) -> SequenceShard:
    """The seam of this batch: its layout and this process's share of the frames."""
    starts = batch.document_starts[0] if batch.document_starts else (0,)
    assert all(row == starts for row in batch.document_starts), (
        "rows that are packed differently go through the model one by one"
    )
    ends = (*starts[1:], batch.frames)
    chunks = tuple(
        s + chunk
        for s, end in zip(starts, ends, strict=True)
        for chunk in chunk_starts(end - s, stage.config.chunk_frames)
    )
    layout = ClipLayout(batch.frames, starts, chunks, tuple(batch.valid_frames.tolist()))
    return make_sequence(
        layout, stage.mesh, stage.kernels, stage.attention, compiled=stage.run.parallel.compile
    )


def conditions_of(stage: Stage, batch: Batch) -> Conditions:
    """What the model sees of this batch besides its latents; text only if the model takes text."""
    stride, frames = stage.dataset.info.temporal_stride, stage.mesh.frames(batch.frames)
    fields = batch.own_entries((frames.start, frames.stop), stride)
    if not stage.run.model.text_width:
        fields = {name: value for name, value in fields.items() if name not in TEXT}
    return Conditions(batch.image_size, stride, fields, null_text=stage.null_text)


def on_device(stage: Stage, batch: Batch) -> Batch:
    """The batch with its tensors where the model is, and what one member of each sequence group
    read given to the others."""
    batch = batch.each_tensor(
        lambda tensor: tensor.to(stage.backend.device, non_blocking=True), keep=("valid_frames",)
    )
    if stage.mesh.comm is not None:
        stage.mesh.comm.share(batch.replicated())
    return batch


def micro_batches(stage: Stage, batch: Batch) -> Iterator[Batch]:
    """The parts of a training batch that go through the model one by one: packed rows each, as each
    has its own documents."""
    return batch_parts(
        batch, len(batch.keys) if stage.run.data.pack else stage.run.trainer.accumulate
    )


def batch_parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` parts of whole rows, in order; the first ones are larger when it does
    not divide."""
    if count == 1:
        yield batch
        return
    bounds = [len(batch.keys) * part // count for part in range(count + 1)]
    sizes = sorted((b - a for a, b in pairwise(bounds)), reverse=True)
    start = 0
    for size in sizes:
        if size:
            rows = slice(start, start + size)
            part = batch.each_tensor(itemgetter(rows))
            yield replace(part, keys=batch.keys[rows], document_starts=batch.document_starts[rows])
        start += size
