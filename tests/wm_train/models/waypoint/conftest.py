"""Fixtures of Waypoint's tests: the formulas, small models, and clips for them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence, SequenceShard
from wm_train.conditioning import Conditions
from wm_train.models.spec import WorldModel, build_model
from wm_train.models.waypoint.config import WaypointConfig

HERE = Path(__file__).parent
ROWS, COLUMNS, CONTROLS = 2, 4, 9  # latents of 4 x 8


@pytest.fixture(scope="session")
def formulas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("waypoint_formulas", HERE / "formulas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def config() -> WaypointConfig:
    """Eight blocks of two kinds, grouped queries, and masks that are full after a few frames."""
    return WaypointConfig(
        latent_channels=3,
        depth=8,
        width=64,
        heads=4,
        key_heads=2,
        mlp_ratio=2,
        noise_features=12,
        controls=CONTROLS,
        window=3,
        dilation=2,
        reach=6,
    )


@dataclass(frozen=True)
class Clip:
    """Noisy clips of T frames for a model, and how to run it on them."""

    latents: Tensor
    sigma: Tensor
    controls: Tensor

    def run(self, model: WorldModel, sequence: SequenceShard, **changes: Tensor) -> Tensor:
        """Return the velocity of the local frames; changes: latents, sigma, controls or
        controls_keep in place of the clip's."""
        local = slice(sequence.frames.start, sequence.frames.stop)
        latents = changes.get("latents", self.latents)[:, local]
        sigma = changes.get("sigma", self.sigma)[:, local]
        size = (16 * latents.shape[3], 16 * latents.shape[4])
        conditions = Conditions(
            size,
            4,
            {"controls": changes.get("controls", self.controls)},
            controls_keep=changes.get("controls_keep"),
        )
        return model(latents, sigma, conditions, sequence)

    def whole(self, model: WorldModel, **changes: Tensor) -> Tensor:
        return self.run(model, LocalSequence(ClipLayout(self.latents.shape[1])), **changes)


@pytest.fixture(scope="session")
def make_clip(config):
    def make(frames: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> Clip:
        g = torch.Generator().manual_seed(frames)
        sizes = (batch, frames, config.latent_channels, 2 * ROWS, 2 * COLUMNS)
        latents = torch.randn(sizes, generator=g, dtype=torch.float64)
        sigma = torch.rand(batch, frames, generator=g, dtype=torch.float64)
        controls = torch.randn(batch, frames, CONTROLS, generator=g, dtype=torch.float64)
        return Clip(latents.to(dtype), sigma.to(dtype), controls.to(dtype))

    return make


@pytest.fixture(scope="session")
def awake():
    """awake(config) -> a model whose every parameter is random, so that nothing is hidden."""

    def make(config: WaypointConfig, dtype: torch.dtype = torch.float64) -> WorldModel:
        model, g = build_model(config).to(dtype), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
                noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                parameter.copy_(noise * fan_in**-0.5)
        return model

    return make
