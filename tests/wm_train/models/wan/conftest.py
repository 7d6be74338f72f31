"""Fixtures of Wan's tests: small models of each kind, and clips for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence, SequenceShard
from wm_train.conditioning import Conditions
from wm_train.models.spec import WorldModel, build_model
from wm_train.models.wan.config import WanConfig

FRAMES, ROWS, COLUMNS, TEXT = 5, 3, 5, 16  # an uneven grid of tokens
SMALL = {"depth": 2, "width": 96, "heads": 4, "ffn_width": 160, "text_width": TEXT}
KINDS = {
    "t2v": WanConfig(latent_channels=4, **SMALL),
    "i2v": WanConfig(latent_channels=4, image_condition_mode="channels", **SMALL),
    "clip": WanConfig(latent_channels=4, image_condition_mode="channels", clip_width=10, **SMALL),
}


@pytest.fixture(scope="session")
def kinds() -> dict[str, WanConfig]:
    return KINDS


@pytest.fixture(scope="session")
def awake() -> Callable[..., WorldModel]:
    """awake(config) -> a model whose every parameter is random, so that nothing is hidden."""

    def make(config: WanConfig, dtype: torch.dtype = torch.float32) -> WorldModel:
        model, g = build_model(config).to(dtype), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
                noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                gain = "norm" in name and name.endswith("weight")
                parameter.copy_(noise * fan_in**-0.5 + gain)
        return model

    return make


@dataclass(frozen=True)
class Clip:
    """Noisy clips of T frames for a model, and how to run it on them."""

    latents: Tensor
    sigma: Tensor
    conditions: Conditions

    def run(self, model: WorldModel, sequence: SequenceShard) -> Tensor:
        local = slice(sequence.frames.start, sequence.frames.stop)
        return model(self.latents[:, local], self.sigma[:, local], self.conditions, sequence)

    def whole(self, model: WorldModel) -> Tensor:
        return self.run(model, LocalSequence(ClipLayout(self.latents.shape[1])))


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    def make(config: WanConfig, dtype: torch.dtype = torch.float32, per_frame: bool = True) -> Clip:
        g = torch.Generator().manual_seed(1)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=g, dtype=torch.float64).to(dtype)

        size = (config.latent_channels, 2 * ROWS, 2 * COLUMNS)
        sigma = torch.rand(2, FRAMES if per_frame else 1, generator=g).expand(2, FRAMES)
        fields = {"text": draw(2, config.text_tokens, TEXT)}
        if config.image_condition_mode == "channels":
            fields["start_video"] = draw(2, 3, *size)  # fewer than FRAMES: the last one is repeated
        if config.clip_width:
            fields["clip_image"] = draw(2, 257, config.clip_width)
        conditions = Conditions((96, 160), 4, fields)
        return Clip(draw(2, FRAMES, *size), sigma, conditions)

    return make
