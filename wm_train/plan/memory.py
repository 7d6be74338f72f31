"""What one process of a stage will hold, in bytes, by running the real model on tensors without
storage.

Weights, optimizer and average are counted from the very objects the trainer builds; activations are
what autograd keeps of the real forward pass. Blocks repeat, so one block of each kind is measured
and multiplied. Nothing is allocated and no accelerator is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from parallel.checkpointing import PRODUCTS
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.sharding import PRECISIONS
from parallel.zero import BUCKET, SWAP_BUFFERS, SWAP_GROUP
from wm_train.compat import FakeTensorMode, TorchDispatchMode
from wm_train.conditioning import Conditions
from wm_train.config.curriculum import matching
from wm_train.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from wm_train.models import build_model
from wm_train.optim.build import OPTIMIZERS


@dataclass(frozen=True)
class ClipShape:
    """The part of a batch that one process holds: `clips` clips of `frames` latent frames (T/P,
    rounded up), and the sizes of a frame."""

    clips: int
    frames: int
    channels: int
    height: int
    width: int
    temporal_stride: int
    text_tokens: int = 300


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by category. `staging` and the categories named in `offloaded` are host
    memory, the rest is on the device.

    `busy`: activations of the one block that is computed or recomputed; `activations`: what all
    blocks keep for their backward besides.
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
        """Bytes by name, without `staging`."""
        names = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "busy")
        return {name: getattr(self, name) for name in names}


def stage_memory(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    shape: ClipShape,
    shards: int,
    parallel: ParallelConfig,
    staged: bool,
    frozen: Iterable[str] = (),
) -> Memory:
    """Memory of one process when the model is sharded over `shards` of them. Raises ValueError for
    a pattern of `frozen` without a match.

    Weights, gradients, optimizer and average are fp32 and sharded; `gathered` holds two blocks and
    what is outside blocks, in the compute type, since the next block is gathered while one runs.
    Sequence exchange buffers (states, halos) are not counted: they are megabytes. ZeRO-3 keeps what
    is computed with besides the master weights, each gradient twice, and a bucket of them; with a
    disk, what a save reads from it.
    """
    precision = parallel.precision
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = build_model(model)
        parameters = dict(whole.named_parameters())
        for name in matching(frozen, parameters, "frozen"):
            parameters[name].requires_grad_(False)
        count = sum(p.numel() for p in whole.parameters())
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        state = {
            id(t): t.numel() * t.element_size()
            for slots in OPTIMIZERS[optimizer.name](whole, optimizer).state.values()
            for t in slots.values()
        }
        width = PRECISIONS[precision].itemsize
        blocks = [
            sum(p.numel() for p in block.parameters())
            for block in whole.get_submodule("blocks").children()
        ]
        gathered = width * (2 * max(blocks) + count - sum(blocks)) if shards > 1 else 0
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
    kept, busy = activation_bytes(model, shape, precision)
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


def activation_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> tuple[int, int]:
    """What autograd keeps from the forward to the backward pass, and the inside of the one block
    that is recomputed, which without checkpointing is among what is kept."""
    period = model.softmax_every
    kinds = [bool(period) and (i + 1) % period == 0 for i in range(model.depth)]  # True: softmax
    kept, inside, outside = dict[bool, int](), dict[bool, int](), 0
    for softmax in sorted(set(kinds)):
        alone = replace(model, depth=1, softmax_every=1 if softmax else 0)
        kept[softmax], around = _per_block(alone, shape, precision)
        outside = max(outside, around)
        inside[softmax] = kept[softmax]
        if model.activation_checkpointing != "none":
            inside[softmax], _ = _per_block(
                replace(alone, activation_checkpointing="none"), shape, precision
            )
    together = outside + sum(kept[kind] for kind in kinds)
    most = max(inside.values())
    return (together - most, most) if model.activation_checkpointing == "none" else (together, most)


def _per_block(model: ModelConfig, shape: ClipShape, precision: str) -> tuple[int, int]:
    """Bytes kept by one block, and by what is around the blocks."""
    one, two = (kept_bytes(replace(model, depth=depth), shape, precision) for depth in (1, 2))
    return two - one, 2 * one - two


class _ProductBytes(TorchDispatchMode):
    """Counts the bytes of what selective checkpointing keeps, which no saved-tensor hook sees."""

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


def kept_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> int:
    """Bytes of the distinct storages that the forward pass of `model` leaves for its backward,
    weights left out."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (
            storage  # held, so that no later storage takes its place in the table
        )
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        built = _built_in(model, PRECISIONS[precision])
        own = {p.untyped_storage()._cdata for p in built.parameters()}
        latents, sigma, conditions = _inputs(model, shape)
        products = _ProductBytes()
        counting = products if model.activation_checkpointing == "selective" else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, _give_back), counting:
            output = built(latents, sigma, conditions, LocalSequence(ClipLayout(shape.frames)))
        assert output.shape == latents.shape
        return products.total + sum(
            storage.nbytes() for key, storage in kept.items() if key not in own
        )


def _give_back(tensor: Tensor) -> Tensor:
    return tensor


def _built_in(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model with parameters of one type. A tensor without storage cannot change its type
    later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_model(model)
    finally:
        torch.set_default_dtype(before)


def _inputs(model: ModelConfig, shape: ClipShape) -> tuple[Tensor, Tensor, Conditions]:
    b, raw = shape.clips, shape.temporal_stride * (shape.frames - 1) + 1
    text = {}
    if model.text_width:
        text = {
            "text": torch.empty(b, shape.text_tokens, model.text_width),
            "text_mask": torch.ones(b, shape.text_tokens, dtype=torch.bool),
        }
    conditions = Conditions.of(
        image_size=(shape.height * 32, shape.width * 32),
        temporal_stride=shape.temporal_stride,
        c2w=torch.empty(b, raw, 4, 4),
        intrinsics=torch.empty(b, raw, 4),
        **text,  # type: ignore[arg-type]
    )
    return (
        torch.empty(b, shape.frames, shape.channels, shape.height, shape.width),
        torch.empty(b, shape.frames),
        conditions,
    )
