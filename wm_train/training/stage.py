"""Open one stage on this rank: data set, mesh and shapes, checked against each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from data_shards.loading.load import Batch
from data_shards.schema import DataError
from data_shards.storage.read import ClipDataset, open_dataset, select_clips
from data_shards.storage.remote import RangeCache, RetryPolicy
from data_shards.time_layout import time_of
from parallel.degrees import MeshDegrees
from parallel.engines import AttentionEngine, make_engine
from parallel.mesh import Mesh, build_mesh
from parallel.reference import Kernels
from wm_train.backends.protocol import Backend
from wm_train.config.curriculum import StagePlan
from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import builder
from wm_train.config.roles import CRITIC, STUDENT, TEACHER, Turn
from wm_train.config.schema import DataConfig, StageConfig
from wm_train.config.worlds import valid_worlds
from wm_train.errors import SetupError
from wm_train.models.examples import ExampleShape
from wm_train.models.flops import FORWARDS_PER_STEP, clip_flops
from wm_train.noise import NoiseKey
from wm_train.world import World


@dataclass(frozen=True)
class Stage:
    """Hold all of a stage on this rank that does not change from step to step."""

    plan: StagePlan
    backend: Backend
    world: World
    mesh: Mesh
    dataset: ClipDataset
    mixture: dict[ClipDataset, float]  # what training draws from, by weight
    latent_frames: int  # T, the longest
    noise: NoiseKey
    null_text: Tensor | None  # [L0, E] on the device; None: no model takes text
    negative_text: Tensor | None  # [L1, E] likewise; None also where the data set has none
    kernels: Kernels  # of this device, as backend.kernels and backend.attention ask
    # an engine of another package for the softmax blocks; None: ours
    attention: tuple[str, AttentionEngine] | None

    @property
    def config(self) -> StageConfig:
        """Return the stage's own configuration, complete."""
        return self.plan.config

    @property
    def data_fingerprint(self) -> str:
        """Return a hash of the samples of training and their order, apart from seed and batch."""
        data = self.config.data
        if list(self.mixture) == [self.dataset] and not data.buckets and not data.pack:
            return self.dataset.fingerprint
        parts = [[dataset.fingerprint, weight] for dataset, weight in self.mixture.items()]
        return hashlib.sha256(
            json.dumps([self.dataset.fingerprint, parts, data.buckets, data.pack]).encode()
        ).hexdigest()

    def clip_flops(self, latent_frames: int, height: int, width: int, role: str = STUDENT) -> float:
        """Return the forward FLOPs of a clip of latents of this size, of one network: of a window
        where it is trained in windows, of all its windows where a student makes it in windows."""
        info, own = self.dataset.info, self.config.roles.get(role, self.config)
        history, windows = self.config.objective.windows(), 1
        if self.config.distill and role == STUDENT and (history := self.config.distill.history):
            whole = replace(history, tail="shift")  # as `window_rollout` makes a clip
            windows = len(whole.chunks(latent_frames))
        latent_frames = history.frames if history else latent_frames
        sizes = (self.latent_frames, height, width, info.temporal_stride, info.text_length)
        longest = ExampleShape(1, *sizes, grouped=info.time_layout == "grouped")
        if history:
            longest = replace(longest, frames=history.frames)
        return windows * clip_flops(own.model, longest, latent_frames, own.chunk_frames)

    def turn_flops(self, latent_frames: int, height: int, width: int, turn: Turn) -> float:
        """Return the FLOPs of a clip in a training step, without recomputation. In distillation the
        student's rollout counts with the mean of its exits, and one pass for the past."""

        def flops(role: str) -> float:
            return self.clip_flops(latent_frames, height, width, role)

        distill = self.config.distill
        if distill is None:
            return FORWARDS_PER_STEP * flops(STUDENT)
        steps = len(distill.levels)
        rollout = (1 + (steps if distill.exit == "last" else (1 + steps) / 2)) * flops(STUDENT)
        if turn.role == CRITIC:
            return rollout + FORWARDS_PER_STEP * flops(CRITIC)
        asked = sum(flops(role) for role in (TEACHER, *distill.experts))
        scores = (1 + len(distill.guidance)) * asked + flops(CRITIC)
        clean = flops(STUDENT) if distill.gradient == "packed" else 0.0  # passed once, for its keys
        return rollout + FORWARDS_PER_STEP * flops(STUDENT) + clean + scores

    def work(self, batch: Batch, turn: Turn) -> dict[str, float]:
        """Count the work of a training step on this batch without padding: `frames` (raw),
        `latent_frames`, `tokens`, `flops`. A clip split over P ranks contributes 1/P on each, so
        the sums over all ranks are the step's."""
        time, ranks, (height, width) = (
            time_of(self.dataset.info),
            self.mesh.sequence_size,
            batch.latents.shape[-2:],
        )
        size = tokens_per_frame(self.config.model, height, width)
        rows = zip(batch.document_starts, batch.valid_frames, strict=True)
        clips = [end - start for starts, last in rows for start, end in pairwise((*starts, last))]
        whole = {
            "frames": sum(time.raw(length) for length in clips),
            "latent_frames": sum(clips),
            "tokens": sum(clips) * size,
            "flops": sum(self.turn_flops(n, height, width, turn) for n in clips),
        }
        return {name: amount / ranks for name, amount in whole.items()}


def open_stage(plan: StagePlan, backend: Backend, world: World) -> Stage:
    """Open the data set, the mesh and the shapes of this stage, and check them against each
    other."""
    config = plan.config
    try:
        for choice in (config.model, config.objective, config.optimizer, config.sampler):
            builder(choice)  # one that is not there would show in hours: the sampler's comes last
        kernels = backend.kernels(backend.device, plan.backend.kernels, plan.backend.attention)
    except ValueError as error:
        raise SetupError(str(error)) from error
    dataset, mixture = open_data(config.data)
    check_indices({dataset, *mixture}, world)
    needs = config.model.needs()
    degrees = MeshDegrees.from_config(config.parallel, world.size, needs.heads, needs.key_heads)
    mesh = build_mesh(
        degrees, backend.device.type, timedelta(seconds=plan.backend.collective_timeout_s)
    )
    if config.global_batch % mesh.data_size:
        nearest = mesh.data_size * max(1, config.global_batch // mesh.data_size)
        raise SetupError(
            f"batch: got global_batch {config.global_batch}, expected a multiple of the"
            f" {mesh.data_size} data-parallel members (key"
            f" recipe.stages.{plan.stage}.global_batch). Fix: global_batch={nearest}, or one of"
            f" {valid_worlds(config.parallel, config.global_batch)} workers"
        )
    share = config.global_batch // mesh.data_size
    if config.trainer.accumulate > share:
        raise SetupError(
            f"batch: got trainer.accumulate {config.trainer.accumulate}, expected at most the"
            f" {share} clips of one process. Fix: trainer.accumulate={share}"
        )
    frames = time_of(dataset.info).latents(config.frames)
    engine = make_engine(config.parallel.attention, mesh.comm)
    models = [config.model, *(own.model for own in config.roles.values())]
    reads_text = any(model.needs().text_width for model in models)
    texts = [dataset.null_text(), dataset.negative_text()] if reads_text else [None, None]
    null_text, negative_text = (
        None if x is None else torch.from_numpy(x).to(backend.device) for x in texts
    )
    noise = NoiseKey(plan.seed, plan.stage)
    return Stage(
        plan,
        backend,
        world,
        mesh,
        dataset,
        mixture,
        frames,
        noise,
        null_text,
        negative_text,
        kernels,
        engine,
    )


def tokens_per_frame(model: ModelConfig, latent_height: int, latent_width: int) -> int:
    """Return S, the tokens per frame of latents of this size."""
    return latent_height * latent_width // model.needs().patch ** 2


def check_indices(datasets: Iterable[ClipDataset], world: World) -> None:
    """Raise DataError on every process unless each index is the one its dataset.json states.

    One process reads them, as they may be large.
    """
    problem = None
    if world.rank == 0:
        try:
            for dataset in datasets:
                dataset.check_index()
        except DataError as error:
            problem = [str(error), error.passing]
    problem = world.from_first(problem)
    if problem:
        raise DataError(*problem)


def open_data(data: DataConfig) -> tuple[ClipDataset, dict[ClipDataset, float]]:
    """Open the data set of `data.path`; return it, and the weight of each data set in training."""
    policy = RetryPolicy(budget_s=data.retry_s)
    cache = RangeCache(Path(data.cache), round(data.cache_gb * 1e9)) if data.cache else None
    datasets = {
        path: open_dataset(path, policy=policy, cache=cache, check=False)
        for path in dict.fromkeys([data.path, *data.mixture])
    }
    for file in data.selection:
        select_clips(list(datasets.values()), file)
    return datasets[data.path], {
        datasets[path]: weight for path, weight in (data.mixture or {data.path: 1.0}).items()
    }
