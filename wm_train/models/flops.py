"""Count the FLOPs of a forward pass of any model; the basis of MFU. A multiply-add counts as two.

The model runs on tensors without storage while torch's counter records its operators: products,
convolutions and attention, which computes visible tiles only. A training step is three forward
passes (one forward, two backward). Recomputed activations are not counted, as MFU measures the
speed of the model's own work.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.compat import FakeTensorMode
from wm_train.config.kinds import ModelConfig
from wm_train.models.examples import ExampleShape, example_conditions
from wm_train.models.spec import build_model

FORWARDS_PER_STEP = 3


def _cpu_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count attention on the host, which torch's table leaves out; shapes come in place of
    tensors."""
    count: int = sdpa_flop_count(q, k, v)
    return count


def _cpu_attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count the backward pass of attention on the host, which torch's table leaves out, too."""
    count: int = sdpa_backward_flop_count(grad, q, k, v)
    return count


def _convolution_backward(
    grad: Any, x: Any, weight: Any, *rest: Any, out_val: Any = None, **_: Any
) -> int:
    """Count the backward pass of a convolution: the FLOPs of the forward pass for each gradient
    that is wanted. torch's table counts that of a grouped convolution as a dense one's.

    rest: sizes of the bias, stride, padding, dilation, whether it is transposed, output padding,
    groups, which gradients are wanted.
    """
    transposed, wanted = rest[4], rest[7]
    forward = 2 * prod(x if transposed else grad) * prod(weight[1:])
    return int(forward * sum(wanted[:2]))


OPERATORS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


def operator_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one call of an operator, 0 for those that torch's table leaves out."""
    packet: Any = getattr(func, "_overloadpacket", None)
    formula = OPERATORS.get(packet) or flop_registry.get(packet)
    if formula is None:
        return 0
    if packet in OPERATORS:
        args = [x.shape if isinstance(x, Tensor) else x for x in args]
    return int(formula(*args, **kwargs, out_val=out))


@cache
def forward_flops(model: ModelConfig, shape: ExampleShape, chunk_frames: int = 0) -> int:
    """Return the FLOPs of one forward pass over `shape.batch` clips of T latent frames, in chunks
    of `chunk_frames` (0: one chunk)."""
    layout = ClipLayout(shape.frames, chunk_starts=chunk_starts(shape.frames, chunk_frames))
    counter = FlopCounterMode(display=False, custom_mapping=OPERATORS)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        built = build_model(model)
        built.use_kernels("reference")
        sizes = (shape.batch, shape.frames, model.latent_channels, shape.height, shape.width)
        latents, sigma = torch.empty(sizes), torch.empty(sizes[:2])
        conditions = example_conditions(model.needs(), shape, seed=0)
        with counter:
            built(latents, sigma, conditions, LocalSequence(layout))
    return int(counter.get_total_flops())


def clip_flops(
    model: ModelConfig, longest: ExampleShape, frames: int, chunk_frames: int = 0
) -> float:
    """Return the forward FLOPs of one clip of `frames` latent frames, at most `longest.frames`.

    Exact at the longest clip, its half and one frame; between them, of packed rows, by the parabola
    through these three: linear layers grow with T, attention with its square.
    """
    whole = longest.frames
    points = sorted({1, (whole + 1) // 2, whole})

    def count(latent_frames: int) -> float:
        return float(forward_flops(model, replace(longest, frames=latent_frames), chunk_frames))

    if frames in points:  # most runs have clips of one length; a count takes seconds
        return count(frames)
    counts = [count(n) for n in points]
    total = 0.0
    for i, x in enumerate(points):  # Lagrange
        weight = 1.0
        for j, other in enumerate(points):
            weight *= (frames - other) / (x - other) if i != j else 1.0
        total += weight * counts[i]
    return total


def mfu(flops: float, seconds: float, workers: int, peak: float) -> float:
    """Return the share of the devices' `peak` (dense FLOP/s of one in the compute type) that the
    model's own FLOPs used."""
    return flops / seconds / workers / peak
