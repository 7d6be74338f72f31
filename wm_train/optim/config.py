"""Configure the optimizers: their keys and rules, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from wm_train.config.kinds import OptimizerConfig
from wm_train.config.rules import AtLeastZero, Below1, Positive, Rule, one_of

BETAS = Rule(lambda pair: all(0 <= beta < 1 for beta in pair), "both at least 0 and less than 1")


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """Configure AdamW (Loshchilov & Hutter 2019) on all parameters."""

    builds: ClassVar[str] = "wm_train.optim.adamw:build_adamw"

    name: str = "adamw"
    betas: Annotated[tuple[float, float], BETAS] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: AtLeastZero = 0.01  # on weights with two or more dimensions only

    def on_zero3(self) -> bool:
        return True


@dataclass(frozen=True)
class NorMuonConfig(OptimizerConfig):
    """Configure NorMuon (Li et al. 2025) at `lr` on the model's matrices, AdamW at lr *
    adamw_lr_scale on the rest."""

    builds: ClassVar[str] = "wm_train.optim.normuon:build_normuon"

    name: str = "normuon"
    momentum: Below1 = 0.95
    beta2: Below1 = 0.95  # of the mean squares of an update's rows
    weight_decay: AtLeastZero = 0.01  # of the matrices
    # rms (an update has the root mean square 0.2 of AdamW's) | muon (that of an orthogonal matrix
    # times sqrt(max(1, rows / columns)), as in the official code: 9 to 19 times smaller at a width
    # of 2048)
    normuon_scale: Annotated[str, one_of("rms", "muon")] = "rms"
    adamw_lr_scale: Positive = 0.1  # Waypoint-1.5 uses 1e-3 for matrices and 1e-4 for the rest
    adamw_betas: Annotated[tuple[float, float], BETAS] = (0.9, 0.95)
    adamw_eps: Positive = 1e-8
    adamw_weight_decay: AtLeastZero = 0.01  # on weights with two or more dimensions only

    def whole_matrices(self) -> bool:
        return True

    def on_zero3(self) -> bool:
        return False
