"""Configure diffusion forcing: its keys and rules, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from wm_train.config.kinds import ObjectiveConfig
from wm_train.config.rules import Finite, Positive, Share
from wm_train.objectives.config import HELD_OUT_LEVELS


@dataclass(frozen=True)
class DiffusionForcingConfig(ObjectiveConfig):
    """Configure a noise level of its own for every latent frame, none of them given (Waypoint-1.5
    §3.1)."""

    builds: ClassVar[str] = "wm_train.objectives.diffusion_forcing:diffusion_forcing"

    name: str = "diffusion_forcing"
    sigma_mean: Finite = 0.0  # logit-normal: sigma = sigmoid(mean + std * normal), then shifted
    sigma_std: Positive = 1.0
    flow_shift: Positive = 1.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    controls_dropout: Share = 0.0  # share of clips that see the null embedding for their controls

    def held_out_levels(self) -> tuple[float, ...]:
        return HELD_OUT_LEVELS

    def held_out(self, sigma: float) -> Self:
        return replace(
            self,
            sigma_mean=math.log(sigma / (1 - sigma)),
            sigma_std=0.0,
            flow_shift=1.0,
            controls_dropout=0.0,
        )

    def sampling_shift(self) -> float:
        return self.flow_shift

    def mixed_documents(self) -> bool:
        return True

    def dropped(self) -> dict[str, float]:
        return {"controls": self.controls_dropout}
