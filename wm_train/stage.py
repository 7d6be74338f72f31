"""One stage on one process: data set, mesh and shapes, opened together and checked against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor

from data_shards.load import Batch, ClipLoader
from data_shards.read import ClipDataset, open_dataset
from data_shards.schema import latent_frame_count
from parallel.engines import AttentionEngine, make_engine
from parallel.layout import ClipLayout
from parallel.mesh import Mesh, MeshDegrees, build_mesh
from parallel.sequence import SequenceShard, make_sequence
from wm_train.backends import Backend
from wm_train.conditioning import Conditions
from wm_train.config import RunConfig, StageConfig
from wm_train.curriculum import ordered
from wm_train.kernels.dispatch import sequence_kernels
from wm_train.metrics.flops import forward_flops, step_flops
from wm_train.models.streaming import chunk_starts
from wm_train.noise import NoiseKey
from wm_train.state import SetupError
from wm_train.world import World


@dataclass(frozen=True)
class Stage:
    """One stage on this process: what does not change from step to step."""

    run: RunConfig
    config: StageConfig
    backend: Backend
    world: World
    mesh: Mesh
    dataset: ClipDataset
    latent_frames: int  # T
    noise: NoiseKey
    null_text: Tensor | None  # [L0, E] on the device; None: the model takes no text
    attention: tuple[str, AttentionEngine] | None  # an engine of others for the softmax blocks; None: ours
    step_flops: int  # of the whole global batch, see metrics/flops.py


def open_stage(run: RunConfig, backend: Backend, world: World) -> Stage:
    """The data set, the mesh and the shapes of this stage, checked against each other."""
    config = run.recipe.stages[run.stage]
    dataset = open_dataset(run.data.path)
    degrees = MeshDegrees.from_config(run.parallel, world.size, run.model.heads)
    mesh = build_mesh(degrees, backend.device.type, timedelta(seconds=run.backend.collective_timeout_s))
    if config.global_batch % mesh.data_size:
        nearest = mesh.data_size * max(1, config.global_batch // mesh.data_size)
        raise SetupError(
            f"batch: got global_batch {config.global_batch}, expected a multiple of the {mesh.data_size} data-parallel members "
            f"(key recipe.stages.{run.stage}.global_batch). Fix: global_batch={nearest}"
        )
    share = config.global_batch // mesh.data_size
    if run.trainer.accumulate > share:
        raise SetupError(
            f"batch: got trainer.accumulate {run.trainer.accumulate}, expected at most the {share} clips of one process. "
            f"Fix: trainer.accumulate={share}"
        )
    frames = latent_frame_count(config.frames, dataset.info.temporal_stride)
    place = ordered(run.recipe).index(run.stage)
    info = dataset.info
    flops = step_flops(
        forward_flops(run.model, frames, info.latent_height * info.latent_width // run.model.patch_size**2), config.global_batch
    )
    engine = make_engine(run.parallel.attention, mesh.comm)
    null = dataset.null_text() if run.model.text_width else None
    null_text = None if null is None else torch.from_numpy(null).to(backend.device)
    return Stage(run, config, backend, world, mesh, dataset, frames, NoiseKey(run.seed, place), null_text, engine, flops)


def open_loader(stage: Stage, split: str, global_batch: int, first_step: int = 0) -> ClipLoader:
    """This process's rows and frames of the global batches from `first_step` on."""
    share = stage.mesh.frames(stage.latent_frames)
    each = global_batch // stage.mesh.data_size
    return ClipLoader(
        stage.dataset,
        split=split,
        seed=stage.run.seed,
        stage=stage.noise.stage,
        global_batch=global_batch,
        rows=range(stage.mesh.data_index * each, (stage.mesh.data_index + 1) * each),
        frames=(share.start, share.stop),
        clip_frames=stage.latent_frames,
        start_step=first_step,
        prefetch=stage.run.data.prefetch,
    )


def sequence_of(stage: Stage, batch: Batch) -> SequenceShard:
    """The seam of this batch: its layout and this process's share of the frames."""
    starts = chunk_starts(stage.latent_frames, stage.config.chunk_frames)
    layout = ClipLayout(stage.latent_frames, chunk_starts=starts, valid_frames=tuple(batch.valid_frames.tolist()))
    return make_sequence(
        layout, stage.mesh, sequence_kernels(stage.backend.device), stage.attention, compiled=stage.run.parallel.compile
    )


def conditions_of(stage: Stage, batch: Batch) -> Conditions:
    """What the model sees of this batch besides its latents; text only if the model takes text."""
    info, takes_text = stage.dataset.info, stage.run.model.text_width > 0
    return Conditions(
        image_size=(info.image_height, info.image_width),
        temporal_stride=info.temporal_stride,
        c2w=batch.c2w,
        intrinsics=batch.intrinsics,
        controls=batch.controls,
        text=batch.text if takes_text else None,
        text_mask=batch.text_mask if takes_text else None,
        null_text=stage.null_text,
    )


def on_device(stage: Stage, batch: Batch) -> Batch:
    """The batch with its tensors where the model is."""
    tensors = {name: getattr(batch, name) for name in ("latents", "c2w", "intrinsics", "controls", "draws", "text", "text_mask")}
    moved = {name: tensor.to(stage.backend.device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
    return replace(batch, **moved)


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` parts of whole clips, in order; the first ones are larger when it does not divide."""
    if count == 1:
        yield batch
        return
    names = ("latents", "c2w", "intrinsics", "controls", "draws", "valid_frames", "text", "text_mask")
    pieces = {name: tensor.tensor_split(count) for name in names if (tensor := getattr(batch, name)) is not None}
    start = 0
    for part in range(count):
        size = len(pieces["draws"][part])
        if size:
            yield replace(batch, **{name: split[part] for name, split in pieces.items()}, keys=batch.keys[start : start + size])
        start += size
