"""Provide AdamW with its state created at construction.

So a checkpoint always has every name, and memory is known before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from wm_train.boxes import local_tensor
from wm_train.optim.config import AdamWConfig


class Optimizer(Protocol):
    """Describe the part of an optimizer that the trainer uses.

    `state` maps each parameter to its named slots.
    """

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Any: ...
    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


class AdamW(torch.optim.AdamW):
    """Run torch's AdamW on the local shard of each tensor.

    The update is element-wise, and sending every operation through DTensor costs more than the
    update itself.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the trainer evaluates the loss before it steps"
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            slots = {
                name: [local_tensor(self.state[p][name]) for p in held]
                for name in ("exp_avg", "exp_avg_sq", "step")
            }
            adamw(
                [local_tensor(p) for p in held],
                [local_tensor(p.grad) for p in held],
                slots["exp_avg"],
                slots["exp_avg_sq"],
                [],
                slots["step"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def adamw_groups(
    parameters: Sequence[Tensor], config: AdamWConfig, dims: Callable[[Tensor], int] = Tensor.dim
) -> list[dict[str, Any]]:
    """Return parameter groups: weights with two or more dimensions decay, all others do not.

    The others are norms, biases and gates.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if dims(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if dims(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def start_adamw_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that AdamW would create at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_adamw(model: nn.Module, config: AdamWConfig) -> Optimizer:
    """Build AdamW over all trainable parameters."""
    groups = adamw_groups([p for p in model.parameters() if p.requires_grad], config)
    optimizer = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    start_adamw_state(optimizer)
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to that of this step, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's own state tensors as {"<parameter>/<slot>": tensor}; of one without
    state, none."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    assert not strangers, (
        f"parameters that the optimizer does not know (were they gathered?): {strangers[:5]}"
    )
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }
