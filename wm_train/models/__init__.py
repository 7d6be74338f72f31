"""Backbones by name. A backbone is built from `ModelConfig` alone, also under torch.device("meta"),
and filled by `initialise_`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from wm_train.config.schema import ModelConfig
from wm_train.models.init import initialise_, parameter_values
from wm_train.models.sana_wm.attention import CameraAttention
from wm_train.models.sana_wm.model import SanaWM

__all__ = ["MODELS", "build_model", "initialise_", "parameter_values", "use_engine_"]

MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {"sana_wm": SanaWM}


def build_model(config: ModelConfig) -> nn.Module:
    """The backbone `config.name`, parameters uninitialised. Raises ValueError for an unknown name
    or an impossible shape."""
    if config.name not in MODELS:
        raise ValueError(
            f"model failed to build: got {config.name!r}, expected one of {sorted(MODELS)} (key"
            " model.name). Fix: model.name=sana_wm"
        )
    step = 8 if config.camera else 2
    if config.width % config.heads or (config.width // config.heads) % step:
        raise ValueError(
            f"model failed to build: got width {config.width} and {config.heads} heads, expected a"
            " head dimension that is a multiple of "
            f"{step} (key model.width). Fix:"
            f" model.width={config.heads * step * max(1, round(config.width / config.heads / step))}"
        )
    return MODELS[config.name](config)


def use_engine_(model: nn.Module, engine: str) -> None:
    """Which kernels the model's layers ask for from now on: auto | triton | reference (key
    backend.kernels)."""
    for module in model.modules():
        if isinstance(module, CameraAttention):
            module.engine = engine
