"""Initialise parameters from keys of their names: values depend on (seed, name), not on
order, device or sharding.

A row (index of the first dimension) of a parameter takes the place of a latent frame in the
counter-based generator, so a shard of some rows computes just those. Slices of the other
dimensions are cut from whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wm_train.boxes import local_box, local_tensor
from wm_train.noise import PARAMETERS, NoiseKey, normal, random_words, unit_interval


@dataclass(frozen=True)
class Rule:
    """Describe the initial distribution of a parameter.

    kind: constant (value `scale`) | normal (mean 0, standard deviation `scale`) | uniform (in
    [-scale, scale]) | last_tap (a depthwise kernel [C, 1, K] that passes its input through: 1 at
    the last tap) | log_uniform (log of a number uniform in (0, scale)) | inverse_softplus (softplus
    of it is log-uniform in [low, scale]). zero_rows: indices of the first dimension that start at
    zero whatever the kind (gates of a modulation table).
    """

    kind: str
    scale: float = 0.0
    low: float = 0.0
    zero_rows: tuple[int, ...] = ()


def default_rule(name: str, shape: Sequence[int]) -> Rule:
    """Return the default rule: biases 0, norm weights 1, matrices and convolutions normal with
    standard deviation 1/sqrt(fan in)."""
    if len(shape) < 2:
        return Rule("constant", 1.0 if name.endswith("weight") else 0.0)
    return Rule("normal", 1.0 / math.sqrt(math.prod(shape[1:])))


def parameter_values(
    seed: int, name: str, shape: Sequence[int], rule: Rule, slices: Sequence[slice] | None = None
) -> Tensor:
    """Return the initial values of a parameter, or of the part `slices` of it (one slice of step 1
    per dimension), fp32 on the CPU.

    shape: the parameter's full shape. Raises ValueError for a rule of unknown kind.
    """
    rows = slices[0] if slices else slice(0, shape[0] if shape else 1)
    start, stop = rows.start or 0, rows.stop if rows.stop is not None else shape[0]
    row_shape = tuple(shape[1:])
    values = _rows(NoiseKey(seed, PARAMETERS), name, (start, max(start, stop)), row_shape, rule)
    for row in rule.zero_rows:
        if start <= row < stop:
            values[row - start] = 0.0
    if slices:
        values = values[(slice(None), *slices[1:])]
    return values if shape else values[0]


def _rows(
    key: NoiseKey, purpose: str, rows: tuple[int, int], row_shape: tuple[int, ...], rule: Rule
) -> Tensor:
    """Return rows start..stop of a parameter, [stop - start, *row_shape]."""
    shape = (rows[1] - rows[0], *row_shape)
    draw = torch.zeros(1, dtype=torch.int64)
    if rule.kind == "constant":
        return torch.full(shape, rule.scale)
    if rule.kind == "normal":
        return normal(key, purpose, draw, rows, row_shape)[0] * rule.scale
    if rule.kind == "last_tap":
        values = torch.zeros(shape)
        values[..., -1] = 1.0
        return values
    count = math.prod(row_shape)
    words = random_words(key, purpose, draw, rows, count)
    u = unit_interval(words).reshape(shape[0], words.shape[2] * 4)[:, :count].reshape(shape)
    if rule.kind == "uniform":
        return (2.0 * u - 1.0) * rule.scale
    if rule.kind == "log_uniform":
        return torch.log(u * rule.scale)
    if rule.kind == "inverse_softplus":
        dt = torch.exp(math.log(rule.low) + u * (math.log(rule.scale) - math.log(rule.low)))
        return dt + torch.log(-torch.expm1(-dt))
    raise ValueError(
        f"parameter initialisation failed: got rule {rule.kind!r}, expected constant, normal,"
        f" uniform, last_tap, log_uniform or inverse_softplus ({purpose}). Fix: correct the model's"
        " initial_rule"
    )


@torch.no_grad()
def initialise_(model: nn.Module, seed: int, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Fill every parameter from (seed, its name) and every buffer by its module, in place.

    `tensors` stand in for the parameters of their names. Works for plain tensors and for DTensors,
    of which each process fills its own part. The model may name a rule per parameter by a method
    `initial_rule(name, shape) -> Rule | None`; the default holds for the rest. Errors: those of
    `reset_buffers_`.
    """
    own = getattr(model, "initial_rule", None)
    for name, parameter in (tensors or dict(model.named_parameters())).items():
        shape = tuple(parameter.shape)
        rule = (own(name, shape) if own else None) or default_rule(name, shape)
        local, box = local_tensor(parameter), local_box(parameter)
        slices = [slice(start, start + size) for start, size in zip(*box)]
        local.copy_(parameter_values(seed, name, shape, rule, slices).to(local.device, local.dtype))
    reset_buffers_(model)


@torch.no_grad()
def reset_buffers_(model: nn.Module) -> None:
    """Fill all buffers by the methods `reset_buffers()` of their modules: rotary tables, constants.

    Checkpoints hold parameters only, so what a module cannot compute anew would be lost: raises
    ValueError that names the first buffer of a module without the method.
    """
    for path, module in model.named_modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
            continue
        for name, _ in module.named_buffers(path, recurse=False):
            kind = type(module).__name__
            raise ValueError(
                f"filling buffers failed: got {name}, a buffer of {kind} that nothing fills, "
                f"expected {kind} to have reset_buffers(). Fix: write it, or use a parameter"
            )
