"""Read the batches of a stage, and hand them to model and objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter

from torch import Tensor

from data_shards.loading.load import Batch, ClipLoader
from data_shards.time_layout import time_of
from parallel.layout import ClipLayout
from parallel.rows import RowsSequence
from parallel.sequence import WholeClip, make_sequence
from parallel.streaming import chunk_starts
from wm_train.conditioning import Conditions
from wm_train.config.roles import STUDENT, Turn
from wm_train.objectives.clips import Clips, RoleTurn
from wm_train.sampling.chunks import Rollouts
from wm_train.training.feed import Feed
from wm_train.training.stage import Stage

TEXT = ("text", "text_mask")


def open_loader(
    stage: Stage,
    split: str,
    global_batch: int,
    first_step: int = 0,
    quarantined: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Feed:
    """Read this rank's rows and frames of the global batches from `first_step` on. The validation
    split ignores mixture, buckets and packing: whole cuts of `data.path`."""
    each, data, training = global_batch // stage.mesh.data_size, stage.config.data, split == "train"
    time, pack = time_of(stage.dataset.info), stage.config.data.pack and split == "train"
    packed = next(iter(stage.mixture)).info
    size = (packed.latent_height, packed.latent_width)

    def frames(length: int) -> tuple[int, int]:
        share = stage.mesh.frames(length)
        return share.start, share.stop

    def loader(step: int, names: frozenset[str]) -> ClipLoader:
        return ClipLoader(
            stage.dataset,
            split=split,
            seed=stage.plan.seed,
            stage=stage.noise.stage,
            global_batch=global_batch,
            rows=range(stage.mesh.data_index * each, (stage.mesh.data_index + 1) * each),
            frames=frames,
            clip_frames=stage.latent_frames,
            shorter=(
                [time.latents(n) for n in data.buckets if n < stage.config.frames]
                if training
                else []
            ),
            mixture=stage.mixture if training else None,
            mixed_rates=data.mixed_rates,
            pack=pack,
            cost=lambda length: stage.clip_flops(length, *size),  # packed rows have one size
            start_step=step,
            prefetch=data.prefetch,
            readers=data.readers,
            quarantined=names,
            replicated=stage.mesh.sequence_index == 0,
            first_frame_only=training and stage.config.objective.reads_first_frame_only(),
            pin="pinned" in stage.backend.capabilities,
        )

    return Feed(loader, data, stage.world, first_step, quarantined, report)


def sequence_of(stage: Stage, batch: Batch, chunk_frames: int | None = None) -> WholeClip:
    """Return the sequence shard of this batch: its layout, and this rank's frames. chunk_frames: of
    the network that sees it; None: the stage's own. Rows that are packed differently have a layout
    each."""
    chunk_frames = stage.config.chunk_frames if chunk_frames is None else chunk_frames
    rows = batch.document_starts or ((0,),)
    if len(set(rows)) == 1:
        return _shard(stage, batch.frames, rows[0], chunk_frames, batch.valid_frames)
    each = zip(rows, batch.valid_frames, strict=True)
    return RowsSequence(
        [_shard(stage, batch.frames, starts, chunk_frames, (valid,)) for starts, valid in each]
    )


def _shard(
    stage: Stage,
    frames: int,
    starts: tuple[int, ...],
    chunk_frames: int,
    valid_frames: tuple[int, ...],
) -> WholeClip:
    """Return the shard of rows with the same documents. frames: T; starts: of the documents."""
    ends = (*starts[1:], frames)
    chunks = tuple(
        s + chunk
        for s, end in zip(starts, ends, strict=True)
        for chunk in chunk_starts(end - s, chunk_frames)
    )
    layout = ClipLayout(frames, starts, chunks, valid_frames)
    parallel = stage.config.parallel
    return make_sequence(
        layout,
        stage.mesh,
        stage.kernels,
        stage.attention,
        compiled=parallel.compile,
        exchange=parallel.attention_exchange,
        recompute=parallel.recompute,  # type: ignore[arg-type]
    )


def conditions_of(stage: Stage, batch: Batch) -> Conditions:
    """Return this batch's fields as conditions of the model; text only if a model takes text."""
    time, frames = time_of(stage.dataset.info), stage.mesh.frames(batch.frames)
    fields = batch.own_entries((frames.start, frames.stop), time)
    models = [stage.config.model, *(own.model for own in stage.config.roles.values())]
    if not any("text" in model.needs().fields for model in models):
        fields = {name: value for name, value in fields.items() if name not in TEXT}
    return Conditions(
        batch.image_size,
        time.stride,
        fields,
        null_text=stage.null_text,
        grouped=time.layout == "grouped",
        negative_text=stage.negative_text,
    )


def role_turn(stage: Stage, batch: Batch, turn: Turn, made: Rollouts | None = None) -> RoleTurn:
    """Return what an objective of several networks needs besides this batch's clips. made: their
    rollouts, where they were made ahead."""
    distill = stage.config.distill
    assert distill is not None, "checked before the start: such an objective is configured by it"
    others = {
        role: sequence_of(stage, batch, own.chunk_frames)
        for role, own in stage.config.roles.items()
    }
    sequences = {STUDENT: sequence_of(stage, batch), **others}
    clean_first = stage.config.model.needs().image == "frame"
    first = first_latents(stage, batch)
    return RoleTurn(turn, distill, sequences, first, stage.kernels, made, clean_first)


def first_latents(stage: Stage, batch: Batch) -> Tensor:
    """Broadcast the first latent frame of each clip [b, C, h, w] from the first rank of a sequence
    group, which has it, to all."""
    b, t, *shape = batch.latents.shape
    first = batch.latents[:, 0].clone() if t else batch.latents.new_empty(b, *shape)
    if stage.mesh.comm is not None:
        stage.mesh.comm.share([first])
    return first


def clips_of(stage: Stage, batch: Batch) -> Clips:
    """Return this batch as the input of an objective."""
    conditions, sequence = conditions_of(stage, batch), sequence_of(stage, batch)
    return Clips(batch.latents, batch.draws, conditions, sequence, stage.noise)


def on_device(stage: Stage, batch: Batch) -> Batch:
    """Move the batch to the device, and broadcast what one rank of each sequence group has read to
    the other ranks."""
    batch = batch.each_tensor(lambda x: x.to(stage.backend.device, non_blocking=True))
    if stage.mesh.comm is not None:
        stage.mesh.comm.share(batch.replicated())
    return batch


def micro_batches(stage: Stage, batch: Batch) -> Iterator[Batch]:
    """Yield the micro-batches of a training batch. Packed rows have documents of their own: they go
    one by one where model or objective need one layout for all rows."""
    apart = stage.config.rows_apart()
    return batch_parts(batch, len(batch.keys) if apart else stage.config.trainer.accumulate)


def batch_parts(batch: Batch, count: int) -> Iterator[Batch]:
    """Split the batch into `count` parts of whole rows, in order; the first ones are larger when
    the rows do not divide evenly."""
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
            yield replace(
                part,
                keys=batch.keys[rows],
                valid_frames=batch.valid_frames[rows],
                document_starts=batch.document_starts[rows],
            )
        start += size
