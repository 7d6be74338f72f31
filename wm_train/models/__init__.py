"""Backbones by name. A backbone is built from `ModelConfig` alone, also under torch.device("meta"), and filled by `initialise_`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from wm_train.config import ModelConfig
from wm_train.models.init import initialise_, parameter_values
from wm_train.models.sana_wm import SanaWM

__all__ = ["MODELS", "build_model", "initialise_", "parameter_values"]

MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {"sana_wm": SanaWM}


def build_model(config: ModelConfig) -> nn.Module:
    """The backbone `config.name`, parameters uninitialised. Raises ValueError for an unknown name or an impossible shape."""
    if config.name not in MODELS:
        raise ValueError(
            f"model failed to build: got {config.name!r}, expected one of {sorted(MODELS)} (key model.name). Fix: model.name=sana_wm"
        )
    step = 8 if config.camera else 2
    if config.width % config.heads or (config.width // config.heads) % step:
        raise ValueError(
            f"model failed to build: got width {config.width} and {config.heads} heads, expected a head dimension that is a multiple of "
            f"{step} (key model.width). Fix: model.width={config.heads * step * max(1, round(config.width / config.heads / step))}"
        )
    return MODELS[config.name](config)
