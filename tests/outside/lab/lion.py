"""Lion: the sign of a momentum (Chen et al. 2023), on the local part of each tensor."""

from __future__ import annotations

from typing import Any

import torch
from lab.config import LionConfig
from torch import nn

from wm_train.boxes import local_tensor


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weight, gradient = local_tensor(parameter), local_tensor(parameter.grad)
                momentum = local_tensor(self.state[parameter]["momentum"])
                update = torch.lerp(gradient, momentum, group["now"]).sign_()
                weight.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=group["lr"])
                momentum.lerp_(gradient, 1 - group["later"])


def build(model: nn.Module, config: LionConfig) -> Lion:
    """Return Lion over all parameters that train, its state made, as checkpoints need it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": config.lr, "now": config.now, "later": config.later, "decay": config.decay}
    lion = Lion(trained, settings)
    for parameter in trained:
        lion.state[parameter]["momentum"] = torch.zeros_like(parameter)
    return lion
