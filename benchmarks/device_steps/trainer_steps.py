"""Take the trainer's own steps on example clips: its state, mesh, objective, guard and optimizer,
without a data set, a configuration file or a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data_shards.loading.batch import Batch
from parallel.degrees import MeshDegrees
from parallel.mesh import build_mesh
from wm_train.backends import get_backend
from wm_train.backends.protocol import Backend
from wm_train.config.curriculum import StagePlan
from wm_train.config.schema import BackendConfig, LauncherConfig, StageConfig, TrackerConfig
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.noise import NoiseKey
from wm_train.resilience.guard import Guard
from wm_train.resilience.preemption import StopRequest
from wm_train.training.data import on_device
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState, build_state
from wm_train.training.step import train_step
from wm_train.training.step_clock import StepClock
from wm_train.world import World, join_world, leave_world

SEED = 0


@dataclass(frozen=True)
class Taken:
    """Store what a run of steps gave: the loss and the seconds of each."""

    losses: list[float]
    seconds: list[float]


def plan_of(config: StageConfig, kernels: str) -> StagePlan:
    """Return a plan of one stage that inherits nothing and writes nothing."""
    nowhere = Path("nowhere")
    return StagePlan(
        run="device_day", pool=None, stage="steps", config=config,
        backend=BackendConfig(kernels=kernels), launcher=LauncherConfig(workers=1),
        tracker=TrackerConfig(name="none"), out=nowhere, seed=SEED, resume=False,
        directory=nowhere, checkpoints=nowhere, source=None, record={},
    )  # fmt: skip


@contextmanager
def opened(
    config: StageConfig, shape: ExampleShape, backend_name: str, kernels: str
) -> Iterator[tuple[Stage, TrainState]]:
    """Open a stage of one process and its state; its process group ends with the context."""
    backend: Backend = get_backend(backend_name)
    join_world(backend, 120.0)
    try:
        mesh = build_mesh(MeshDegrees(), backend.device.type)
        info: Any = SimpleNamespace(
            temporal_stride=shape.temporal_stride, text_length=shape.text_tokens
        )
        table = backend.kernels(backend.device, kernels, "auto")
        dataset: Any = SimpleNamespace(info=info)
        plan = plan_of(config, kernels)
        stage = Stage(
            plan, backend, World(0, 1), mesh, dataset, {}, shape.frames,
            NoiseKey(SEED, "steps"), None, table, None,
        )  # fmt: skip
        yield stage, build_state(plan, mesh.fsdp, backend.device)
    finally:
        leave_world()


def example_batch(config: StageConfig, shape: ExampleShape, step: int) -> Batch:
    """Return the clips of one step; every step repeats the same ones with other noise."""
    needs = config.model.needs()
    conditions = example_conditions(needs, shape, SEED)
    draws = torch.arange(shape.batch) + step * shape.batch
    return Batch(
        example_latents(needs, shape, SEED),
        dict(conditions.fields),
        tuple(f"clip{i}" for i in range(shape.batch)),
        draws,
        torch.full((shape.batch,), shape.frames),
        ((0,),) * shape.batch,
        shape.frames,
        conditions.image_size,
        0.0,
    )


def take_steps(
    stage: Stage, state: TrainState, shape: ExampleShape, steps: int, first: int = 1
) -> Taken:
    """Take steps `first` to `first + steps - 1` and wait for each."""
    guard, clock = Guard(stage.config.trainer), StepClock(stage, state)
    taken = Taken([], [])
    for step in range(first, first + steps):
        batch = on_device(stage, example_batch(stage.config, shape, step))
        stage.backend.synchronize()
        started = time.perf_counter()
        clock.begin()
        report = train_step(stage, state, batch, step, guard, StopRequest(), clock)
        stage.backend.synchronize()
        clock.end(0.0)
        taken.seconds.append(time.perf_counter() - started)
        taken.losses.append(report.figures["loss"])
    return taken


def with_precision(config: StageConfig, precision: str, compiled: bool = False) -> StageConfig:
    return replace(config, parallel=replace(config.parallel, precision=precision, compile=compiled))
