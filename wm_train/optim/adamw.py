"""AdamW with its state made at once, so that a checkpoint always has every name and memory is known before the first step."""

from __future__ import annotations

import torch
from torch import nn

from wm_train.config import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters; only weights with two or more dimensions decay (norms, biases and gates do not)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps)
    for parameter in trainable:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


OPTIMIZERS = {"adamw": build_adamw}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state by parameter name: {"<parameter>/<slot>": tensor}, the very tensors the optimizer updates."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for slot, tensor in optimizer.state[parameter].items()
    }
