"""Rehearse a training step of one rank of any world in this process, without its memory.

The trainer's own code runs: mesh, sharded model, optimizer, sequence shard, objective, backward
pass. Tensors have shapes only, and a group of processes that exists in name only answers
collectives. So recomputation, roles, rollouts, frozen parts and buffers of collectives are counted
because they happen, not by formula. Weights have no values; whatever reads one on the host fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.fields import is_by_row
from data_shards.loading.load import Batch
from data_shards.storage.read import ClipDataset
from parallel.degrees import MeshDegrees
from parallel.local_attention import block_attention, block_attention_backward
from parallel.masks import Tile
from parallel.mesh import build_mesh
from parallel.reference import Kernels
from wm_train.backends import cpu
from wm_train.backends.absent import Device
from wm_train.backends.protocol import Backend
from wm_train.boxes import local_tensor
from wm_train.compat import (
    DataDependentOutputException,
    FakeStore,
    FakeTensorMode,
    pieces_as_read,
    without_labels,
)
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT, Turn
from wm_train.kernels.dispatch import forget_tables, recurrences
from wm_train.kernels.engine import rehearsed, rehearsed_device
from wm_train.models.examples import ExampleShape, example_conditions
from wm_train.models.spec import WorldModel
from wm_train.noise import NoiseKey
from wm_train.plan.latents import TEXT_TOKENS, Frame
from wm_train.plan.repeated.blocks_once import attention_once, blocks_once
from wm_train.plan.repeated.repeats import passes_once
from wm_train.plan.speed.collectives import Call, gloo_copies
from wm_train.plan.tracing import Tracer, Work, nothing_inside
from wm_train.sampling import history
from wm_train.training.networks import build_networks
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState
from wm_train.training.step import add_gradients
from wm_train.world import World


@dataclass(frozen=True)
class Rehearsal:
    """Hold what one step of one rank needs: `peak` bytes and what they are; the part of them that
    is `held` from step to step; bytes alive in the optimizer's step; operators by phase; how often
    each collective is called.

    categories at the peak: weights, optimizer, average, gradients, gathered (whole weights of
    units), activations (kept from the forward to the backward pass), backward (recomputed blocks
    and what they return), communication (buffers of collectives).
    """

    peak: int
    at_peak: dict[str, int]
    held: int
    update: int
    work: dict[tuple[str, str], Work]
    collectives: dict[Call, int]


class ReadsOnHost(RuntimeError):
    """Report an operator that reads a tensor's values on the host, which a rehearsal has not."""


@contextmanager
def world_in_name(size: int, rank: int) -> Iterator[World]:
    """Join a world of `size` processes that do not exist, as process `rank`."""
    assert not dist.is_initialized(), "a rehearsal needs a process of its own"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def rehearse(
    plan: StagePlan,
    frame: Frame,
    rank: int = 0,
    role: str = STUDENT,
    device: Device | None = None,
    on_host: bool = True,
    once: bool = True,
) -> Rehearsal:
    """Rehearse a turn of the network `role` on the longest clips of a stage.

    device: type and compute capability of the device whose kernels are to run; None: the plain
    ones of the host. on_host: without a device, processes are joined by gloo, with the copies that
    it makes. once: as for `trace_turn`. The state is FSDP2's on one device; for ZeRO-3 and what is
    moved to the host, see `wm_train/plan/memory.py`. Raises ReadsOnHost where the stage's code
    reads values.
    """
    tracer = Tracer(inside=gloo_copies if on_host and device is None else nothing_inside)
    there = rehearsed(*device, tracer.launched) if device else nullcontext()
    with world_in_name(plan.launcher.workers, rank) as world, there:
        if device:
            plan = replace(plan, backend=replace(plan.backend, kernels="triton"))
        stage = open_shapes(plan, frame, world)
        stage = replace(stage, kernels=distinct_tiles(stage.kernels, tracer))
        if once and not chooses_what_to_keep(stage):
            stage = replace(stage, kernels=attention_once(stage.kernels, tracer))
        shapes = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with shapes, pieces_as_read():
                state = build_networks(plan, stage.mesh.fsdp, stage.backend.device, filled=False)
            with shapes, tracer, tracer.resizing(), without_labels(), numbers_in_name():
                batch = example_batch(stage, frame)
                return trace_turn(stage, state, batch, Turn(role, 0), tracer, once)
        except DataDependentOutputException as error:
            raise ReadsOnHost(str(error.func)) from error
        finally:
            if device:
                forget_tables()


@contextmanager
def numbers_in_name() -> Iterator[None]:
    """Choose frames by random numbers between 0 and 1 in place of values that are not there: which
    frames a window takes changes nothing of its shapes."""
    original, numbers = history.host_numbers, np.random.default_rng(0)
    history.host_numbers = lambda x: numbers.random(tuple(x.shape))
    try:
        yield
    finally:
        history.host_numbers = original


def chooses_what_to_keep(stage: Stage) -> bool:
    """Return whether a network's checkpointing keeps results operator by operator, each of which it
    has to see."""
    models = [stage.config.model, *(own.model for own in stage.config.roles.values())]
    return any(model.activation_checkpointing == "selective" for model in models)


def distinct_tiles(kernels: Kernels, tracer: Tracer) -> Kernels:
    """Return the table with an attention that computes one of each kind of tile, for all tiles of
    that kind: without values they are the same work on the same bytes."""

    def walk(tiles: Iterable[Tile]) -> Iterator[Tile]:
        kinds: dict[object, list[Tile]] = {}
        for tile in tiles:
            keys = sum(stop - start for start, stop in tile.keys)
            rows = None if tile.rows is None else len(tile.rows)
            queries = tile.queries[1] - tile.queries[0]
            kind = (rows, queries, keys, len(tile.keys), tile.diagonal)
            kinds.setdefault(kind, []).append(tile)
        for alike in kinds.values():
            with tracer.times(len(alike)):
                yield alike[0]

    return kernels._replace(
        block_attention=partial(block_attention, walk=walk),
        block_attention_backward=partial(block_attention_backward, walk=walk),
    )


def trace_turn(
    stage: Stage, state: TrainState, batch: Batch, turn: Turn, tracer: Tracer, once: bool = False
) -> Rehearsal:
    """Add the gradients of a turn inside an entered tracer, and return what it saw. The optimizer
    does not step: it would need a copy of the gradients besides what is held. once: passes of a
    rollout that differ in values alone run once, on tensors without values."""
    for category, tensors in state_tensors(state).items():
        tracer.claim(tensors, category)
    tracer.claim(buffers(state), tracer.phase)
    tracer.restart()
    held = tracer.now
    with ExitStack() as entered:
        entered.enter_context(passes(tracer, state))
        if once:
            entered.enter_context(passes_once(tracer))
            entered.enter_context(blocks_once(tracer, networks(state)))
        add_gradients(stage, state, batch, turn)
    active = state.of(turn.role)
    gradients = active.gradients(stage.world.rank)
    early = tracer.claim(gradients, "gradients")
    at_peak = {name: size for name, size in tracer.at_peak.items() if size}
    at_peak["gradients"] = early
    at_peak["backward"] = at_peak.get("backward", 0) - early
    update = held + 2 * sum(g.numel() * g.element_size() for g in gradients)
    peak = max(tracer.peak, update)
    calls = dict(Counter(tracer.collectives))
    work = {key: done for key, done in tracer.work.items() if done.calls}
    return Rehearsal(peak, at_peak, held, update, work, calls)


@contextmanager
def passes(tracer: Tracer, state: TrainState) -> Iterator[None]:
    """Count what happens inside calls of `backward` to the backward pass, the rest to the
    forward pass."""
    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with tracer.during("backward"):
            return original(*args, **kwargs)

    torch.autograd.backward = backward
    try:
        with tracer.during("activations"):
            yield
    finally:
        torch.autograd.backward = original


def state_tensors(state: TrainState) -> dict[str, list[Tensor]]:
    """Return the local tensors that are held from step to step, by category."""
    every = [state, *state.roles.values()]
    weights = [p for one in every for p in one.model.parameters()]
    weights += [p for model in state.frozen.values() for p in model.parameters()]
    slots = [slots for one in every for slots in one.optimizer.state.values()]
    return {
        "weights": [local_tensor(p.detach()) for p in weights],
        "optimizer": [local_tensor(x) for held in slots for x in held.values()],
        "average": [local_tensor(x) for one in every for x in one.ema.values()],
    }


def networks(state: TrainState) -> list[WorldModel]:
    """Return the networks of all roles."""
    return [state.model, *(own.model for own in state.roles.values()), *state.frozen.values()]


def buffers(state: TrainState) -> list[Tensor]:
    """Return the local tensors of all networks that are not weights."""
    return [local_tensor(one) for network in networks(state) for one in network.buffers()]


def open_shapes(
    plan: StagePlan, frame: Frame, world: World, backend: Backend | None = None
) -> Stage:
    """Return the stage as `open_stage` does, with a data set of which only sizes are known.

    backend: None: the host, whatever the stage will find.
    """
    config, backend = plan.config, backend or cpu.make(torch.get_num_threads(), 0)
    time = frame.time(config.frames)
    needs = config.model.needs()
    degrees = MeshDegrees.from_config(config.parallel, world.size, needs.heads, needs.key_heads)
    info = SimpleNamespace(
        temporal_stride=time.stride, time_layout=time.layout, text_length=TEXT_TOKENS
    )
    sizes = cast(ClipDataset, SimpleNamespace(info=info, fingerprint=""))
    models = [config.model, *(own.model for own in config.roles.values())]
    width = max(model.needs().text_width for model in models)
    text = torch.empty(TEXT_TOKENS, width, device="meta") if width else None
    # the attention of a device that is not here is that of the host: the same bytes, by one kernel
    engine = "auto" if rehearsed_device() else plan.backend.attention
    engines = "auto" if backend.device.type == "cpu" else plan.backend.kernels
    kernels = backend.kernels(backend.device, engines, engine)
    if rehearsed_device():
        kernels = kernels._replace(**recurrences(plan.backend.kernels))
    return Stage(
        plan=plan,
        backend=backend,
        world=world,
        mesh=build_mesh(degrees, backend.device.type),
        dataset=sizes,
        mixture={},
        latent_frames=time.latents(config.frames),
        noise=NoiseKey(plan.seed, plan.stage),
        null_text=text,
        negative_text=text,
        kernels=kernels,
        attention=None,
    )


def trajectories(stage: Stage, frame: Frame, clips: int) -> dict[str, Tensor]:
    """Return the members ode and ode_start of so many clips, if the stage trains on them."""
    levels = stage.config.objective.trajectory_levels()
    if not levels:
        return {}
    sizes = (stage.latent_frames, len(levels), frame.channels, frame.height, frame.width)
    start = torch.zeros(clips, 8, dtype=torch.uint8)
    return {"ode": torch.zeros(clips, *sizes), "ode_start": start}


def example_batch(stage: Stage, frame: Frame) -> Batch:
    """Return this rank's part of a batch of the stage's longest clips, without values."""
    config, frames = stage.config, stage.latent_frames
    clips, share = config.global_batch // stage.mesh.data_size, stage.mesh.frames(frames)
    grouped = frame.time(config.frames).layout == "grouped"
    sizes = (frame.height, frame.width, frame.temporal_stride, TEXT_TOKENS, grouped)
    conditions = example_conditions(
        config.model.needs(), ExampleShape(clips, frames, *sizes), seed=0
    )
    whole = {**conditions.fields, **trajectories(stage, frame, clips)}
    fields = {
        name: value[:, share.start : share.stop] if is_by_row(f"{name}.npy") else value
        for name, value in whole.items()
    }
    return Batch(
        torch.zeros(clips, len(share), frame.channels, frame.height, frame.width),
        fields,
        tuple(str(clip) for clip in range(clips)),
        torch.arange(clips),
        (frames,) * clips,
        ((0,),) * clips,
        frames,
        conditions.image_size,
        0.0,
    )
