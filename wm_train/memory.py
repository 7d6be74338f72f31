"""What one process of a stage will hold, in bytes, by running the real model on tensors without storage.

Weights, optimizer and average are counted from the very objects the trainer builds; activations are what autograd keeps of the real forward
pass. Blocks repeat, so one block of each kind is measured and multiplied. Nothing is allocated and no accelerator is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.sharding import PRECISIONS
from wm_train.conditioning import Conditions
from wm_train.config import ModelConfig, OptimizerConfig
from wm_train.models import build_model
from wm_train.optim.build import OPTIMIZERS


@dataclass(frozen=True)
class ClipShape:
    """The part of a batch that one process holds: `clips` clips of `frames` latent frames (T/P, rounded up), and the sizes of a frame."""

    clips: int
    frames: int
    channels: int
    height: int
    width: int
    temporal_stride: int
    text_tokens: int = 300


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by category. `staging` is host memory, the rest is on the device."""

    parameters: int  # of the whole model, as a number, not bytes
    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int
    staging: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.gathered + self.activations


def stage_memory(model: ModelConfig, optimizer: OptimizerConfig, shape: ClipShape, shards: int, precision: str, staged: bool) -> Memory:
    """Memory of one process when the model is sharded over `shards` of them.

    Weights, gradients, optimizer and average are fp32 and sharded; `gathered` holds two blocks and what is outside blocks, in the compute
    type, since the next block is gathered while one runs. Sequence exchange buffers (states, halos) are not counted: they are megabytes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = build_model(model)
        count = sum(p.numel() for p in whole.parameters())
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        state = {
            id(t): t.numel() * t.element_size()
            for slots in OPTIMIZERS[optimizer.name](whole, optimizer).state.values()
            for t in slots.values()
        }
        width = PRECISIONS[precision].itemsize
        blocks = [sum(p.numel() for p in block.parameters()) for block in whole.get_submodule("blocks").children()]
        gathered = width * (2 * max(blocks) + count - sum(blocks)) if shards > 1 else 0
    weights, optimizer_bytes = 4 * count // shards, sum(state.values()) // shards
    average = 4 * trained // shards if optimizer.ema_decay else 0
    return Memory(
        parameters=count,
        weights=weights,
        gradients=4 * trained // shards,
        optimizer=optimizer_bytes,
        average=average,
        gathered=gathered,
        activations=activation_bytes(model, shape, precision),
        staging=weights + optimizer_bytes + average if staged else 0,
    )


def activation_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> int:
    """What autograd keeps from the forward to the backward pass. With checkpointing, a block's input each and one block's inside."""
    period = model.softmax_every
    kinds = [bool(period) and (i + 1) % period == 0 for i in range(model.depth)]  # True: softmax
    measured: dict[bool, int] = {}
    outside = 0
    for softmax in sorted(set(kinds)):
        every = 1 if softmax else 0
        one, two = (
            kept_bytes(replace(model, depth=depth, softmax_every=every, gradient_checkpointing=False), shape, precision) for depth in (1, 2)
        )
        measured[softmax], outside = two - one, max(outside, one - (two - one))
    if not model.gradient_checkpointing:
        return outside + sum(measured[kind] for kind in kinds)
    tokens = shape.clips * shape.frames * (shape.height // model.patch_size) * (shape.width // model.patch_size)
    return outside + len(kinds) * tokens * model.width * PRECISIONS[precision].itemsize + max(measured.values())


def kept_bytes(model: ModelConfig, shape: ClipShape, precision: str) -> int:
    """Bytes of the distinct storages that the forward pass of `model` leaves for its backward, weights left out."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later storage takes its place in the table
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        built = _built_in(model, PRECISIONS[precision])
        own = {p.untyped_storage()._cdata for p in built.parameters()}
        latents, sigma, conditions = _inputs(model, shape)
        with torch.autograd.graph.saved_tensors_hooks(keep, _give_back):
            output = built(latents, sigma, conditions, LocalSequence(ClipLayout(shape.frames)))
        assert output.shape == latents.shape
        return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def _give_back(tensor: Tensor) -> Tensor:
    return tensor


def _built_in(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model with parameters of one type. A tensor without storage cannot change its type later."""
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
    conditions = Conditions(
        image_size=(shape.height * 32, shape.width * 32),
        temporal_stride=shape.temporal_stride,
        c2w=torch.empty(b, raw, 4, 4),
        intrinsics=torch.empty(b, raw, 4),
        **text,  # type: ignore[arg-type]
    )
    return torch.empty(b, shape.frames, shape.channels, shape.height, shape.width), torch.empty(b, shape.frames), conditions
