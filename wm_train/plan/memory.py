"""Predict the bytes that one rank of a stage will hold, by formula: what is on the host and the
disk, and where no step can be rehearsed (`wm_train/plan/rehearsal.py`), what is on the device.

Weights, optimizer and average are counted from the objects that the trainer builds; activations are
the tensors that autograd keeps of the real forward pass. Blocks repeat, so one block of each kind
is measured and multiplied. Nothing is allocated and no accelerator is needed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from parallel.checkpointing import PRODUCTS
from parallel.layout import ClipLayout
from parallel.packed import CleanPass
from parallel.sequence import LocalSequence
from parallel.sharding import PRECISIONS
from parallel.zero import BUCKET, SWAP_BUFFERS, SWAP_GROUP
from wm_train.checkpoint.handover import match_names
from wm_train.compat import FakeTensorMode, TorchDispatchMode
from wm_train.conditioning import Conditions
from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import builder
from wm_train.config.schema import StageConfig
from wm_train.models.examples import ExampleShape, example_conditions
from wm_train.models.spec import WorldModel, build_model
from wm_train.plan.store import facts_of, folder, keep, load, name_of


@dataclass(frozen=True)
class ClipShape:
    """Describe the part of a batch on one rank: `clips` clips of `frames` latent frames (T/P,
    rounded up), and the sizes of a frame."""

    clips: int
    frames: int
    channels: int
    height: int
    width: int
    temporal_stride: int
    text_tokens: int = 300
    grouped: bool = False


@dataclass(frozen=True)
class Memory:
    """Hold the bytes of one rank by category. `staging` and the categories named in `offloaded` are
    host memory, the rest is on the device.

    `busy`: activations of the one block that is computed or recomputed, or what the optimizer's
    step needs besides, if that is more; `activations`: tensors that all blocks save for backward
    besides.
    """

    parameters: int  # of the whole model, as a number, not bytes
    trained: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int
    busy: int
    staging: int
    offloaded: tuple[str, ...] = ()
    disk: int = 0  # this process's files on its node's disk

    @property
    def device(self) -> int:
        return sum(size for name, size in self.categories().items() if name not in self.offloaded)

    @property
    def host(self) -> int:
        return self.staging + sum(
            size for name, size in self.categories().items() if name in self.offloaded
        )

    def categories(self) -> dict[str, int]:
        """Return bytes by name, without `staging`."""
        names = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "busy")
        return {name: getattr(self, name) for name in names}


def stage_memory(
    stage: StageConfig, shape: ClipShape, shards: int, with_activations: bool = True
) -> Memory:
    """Return the memory of one rank when the stage's model is sharded over `shards` ranks; without
    activations, which take long to count, these are 0.

    Raises ValueError for a pattern of `frozen` without a match. Weights, gradients, optimizer and
    average are fp32 and sharded; `gathered` holds two units and all parameters outside units, in
    the compute type, since the next unit is gathered while one runs. Sequence exchange buffers
    (states, halos) are not counted: they are megabytes. ZeRO-3 keeps compute weights besides the
    master weights, each gradient twice, and a bucket of them; with a disk, the part of the state
    that a save reads from it. Kept on disk.
    """
    facts = [facts_of(stage), stage.trainer.async_checkpoint, asdict(shape), shards]
    path = folder() / f"{name_of(['memory', *facts, with_activations])}.json"
    try:
        kept = load(path)
        return Memory(**{**kept, "offloaded": tuple(kept["offloaded"])})
    except (TypeError, KeyError):  # nothing is kept, or it is damaged
        made = _stage_memory(stage, shape, shards, with_activations)
        keep(path, asdict(made))
        return made


def _stage_memory(
    stage: StageConfig, shape: ClipShape, shards: int, with_activations: bool
) -> Memory:
    model, optimizer, parallel = stage.model, stage.optimizer, stage.parallel
    staged, precision = stage.trainer.async_checkpoint, parallel.precision
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = build_model(model)
        parameters = dict(whole.named_parameters())
        for name in match_names(stage.frozen, parameters, "frozen"):
            parameters[name].requires_grad_(False)
        count = sum(p.numel() for p in whole.parameters())
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        state = {
            id(t): t.numel() * t.element_size()
            for slots in builder(optimizer)(whole, optimizer).state.values()
            for t in slots.values()
        }
        width = PRECISIONS[precision].itemsize
        units = [sum(p.numel() for p in unit.parameters()) for unit in whole.units()]
        gathered = width * (2 * max(units) + count - sum(units)) if shards > 1 else 0
    weights, optimizer_bytes = 4 * count // shards, sum(state.values()) // shards
    average = 4 * trained // shards if optimizer.ema_decay else 0
    saved = weights + optimizer_bytes + average
    gradients, disk = 4 * trained // shards, 0
    if parallel.sharding == "zero3":
        one_copy = width == 4 and parallel.offload_state == "none"
        weights, gradients = (
            (width * count + (0 if one_copy else 4 * trained)) // shards,
            2 * gradients,
        )
        gathered += 4 * BUCKET
    if parallel.offload_state == "nvme":
        disk = 4 * trained // shards + optimizer_bytes
        largest = max(p.numel() for p in parameters.values())
        weights = width * count // shards
        optimizer_bytes = SWAP_BUFFERS * 4 * min(trained, SWAP_GROUP * shards + largest) // shards
    kept, busy = activation_bytes(model, shape, precision) if with_activations else (0, 0)
    return Memory(
        parameters=count,
        trained=trained,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer_bytes,
        average=average,
        gathered=gathered,
        activations=kept,
        busy=busy,
        staging=saved * staged + disk,
        offloaded=(
            *(
                ("weights", "gradients", "optimizer", "average")
                if parallel.offload_state != "none"
                else ()
            ),
            *(("activations",) if parallel.offload_activations else ()),
        ),
        disk=disk,
    )


@cache
def activation_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> tuple[int, int]:
    """Return the bytes that autograd keeps from the forward to the backward pass, and those inside
    the one unit that is recomputed, which without checkpointing are part of the first."""
    plain = replace(model, activation_checkpointing="none")
    kept, most = deep_bytes(plain, shape, precision)
    if model.activation_checkpointing == "none":
        return kept - most, most
    return deep_bytes(model, shape, precision)[0], most


def deep_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> tuple[int, int]:
    """Return the bytes that a forward pass leaves for its backward, and the most of one unit; of a
    deep model from two shallow ones, as each pattern of blocks leaves the same."""
    depth, pattern = model.blocks()
    if not pattern or depth <= 2 * pattern:
        kept, inside = kept_bytes(model, shape, precision)
        return kept, max(inside)
    one, two = (
        kept_bytes(model.with_blocks(blocks), shape, precision) for blocks in (pattern, 2 * pattern)
    )
    return one[0] + (depth - pattern) * (two[0] - one[0]) // pattern, max(one[1])


class _ProductBytes(TorchDispatchMode):
    """Count the bytes that selective checkpointing keeps, which saved-tensor hooks do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.total += sum(
                t.numel() * t.element_size()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, Tensor)
            )
        return out


def kept_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> tuple[int, list[int]]:
    """Return the bytes of the distinct storages that a forward pass leaves for its backward,
    weights excluded, and those that each unit adds to them."""
    kept: dict[int, Any] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (
            storage  # held, so that no later storage takes its place in the table
        )
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        built = _built_in(model, PRECISIONS[precision])
        own = {p.untyped_storage()._cdata for p in built.parameters()}
        products, before, inside = _ProductBytes(), list[int](), list[int]()

        def total() -> int:
            return products.total + sum(s.nbytes() for key, s in kept.items() if key not in own)

        for unit in built.units():
            unit.register_forward_pre_hook(lambda *_: before.append(total()))
            unit.register_forward_hook(lambda *_: inside.append(total() - before.pop()))
        latents, sigma, conditions = _inputs(model, shape)
        counting = products if model.activation_checkpointing == "selective" else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(hold, _give_back), counting:
            output = built(latents, sigma, conditions, LocalSequence(ClipLayout(shape.frames)))
        assert output.shape == latents.shape
        return total(), inside


@cache
def clean_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> int:
    """Return the bytes of the keys and values that a packed pass keeps of clean frames."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        built = _built_in(model, PRECISIONS[precision])
        clean = CleanPass(LocalSequence(ClipLayout(shape.frames)))
        latents, sigma, conditions = _inputs(model, shape)
        built(latents, sigma, conditions, clean)
        return sum(x.numel() * x.element_size() for pair in clean.kept for x in pair)


def _give_back(tensor: Tensor) -> Tensor:
    return tensor


def _built_in(model: ModelConfig, dtype: torch.dtype) -> WorldModel:
    """Build the model with parameters of one type, as a tensor without storage cannot change its
    type later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_model(model)
    finally:
        torch.set_default_dtype(before)


def _inputs(model: ModelConfig, shape: ClipShape) -> tuple[Tensor, Tensor, Conditions]:
    """Return latents, noise levels and conditions of these sizes."""
    sizes = (shape.clips, shape.frames, shape.height, shape.width)
    example = ExampleShape(*sizes, shape.temporal_stride, shape.text_tokens, shape.grouped)
    latents = torch.empty(shape.clips, shape.frames, shape.channels, shape.height, shape.width)
    conditions = example_conditions(model.needs(), example, seed=0)
    return latents, torch.empty(shape.clips, shape.frames), conditions
