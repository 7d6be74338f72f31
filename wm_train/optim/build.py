"""Map optimizer names to the functions that build them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from wm_train.config.schema import OptimizerConfig
from wm_train.optim.adamw import Optimizer, build_adamw
from wm_train.optim.normuon import build_normuon

OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], Optimizer]] = {
    "adamw": build_adamw,
    "normuon": build_normuon,
}
