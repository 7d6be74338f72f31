"""Define the interface of a model to trainer, samplers, planner and parity proof, and build models.

A new model is a folder with a configuration (`config.py`, no torch) and a subclass of `WorldModel`,
and one row in `wm_train/config/registry.py`, or an entry point of another package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn

from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import builder
from wm_train.config.rules import broken_rules
from wm_train.models.init import Rule

SMALLEST_SIDE = 16  # thinner matrices (per-head gates, tables) gain nothing from orthogonalisation


class WorldModel(nn.Module):
    """Predict the velocity of noisy latents; base class of all models.

    forward(latents [B, t, C, h, w], sigma [B, t] fp32 in [0, 1], conditions, sequence) -> velocity
    [B, t, C, h, w]: latents of the local frames, conditions of the whole clip. Everything that
    crosses frames goes through `sequence` (parallel/sequence.py).
    """

    def units(self) -> Sequence[nn.Module]:
        """Return the modules that are sharded, compiled and recomputed one by one, in order."""
        raise TypeError(f"{type(self).__name__} has no units(), expected every model to name them")

    def exact_units(self) -> Sequence[nn.Module]:
        """Return the modules, inside units or not, that compute in fp32 whatever the model's type.

        Each is called as a module, as a unit of its own that is sharded with fp32 weights.
        """
        return ()

    def initial_rule(self, name: str, shape: Sequence[int]) -> Rule | None:
        """Return the initial rule of a parameter; None: `init.default_rule`."""
        return None

    def unused_parameters(self) -> frozenset[str]:
        """Return parameters that exist for the checkpoint layout only: never read or trained."""
        return frozenset()

    def matrix_parameters(self) -> frozenset[str]:
        """Return the weights that a matrix optimizer takes: those of units with two wide sides."""
        inside = {id(p) for unit in self.units() for p in unit.parameters()}
        return frozenset(
            name
            for name, p in self.named_parameters()
            if id(p) in inside
            and p.dim() >= 2
            and min(p.shape[0], math.prod(p.shape[1:])) >= SMALLEST_SIDE
        )

    def switched_parameters(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that a stage's own switches of the model may add or remove."""
        return []

    def passes_at(self, level: float) -> dict[str, bool]:
        """Return for each part of the model whether it passes clips at a noise level; {} for a
        model of one part."""
        return {}

    def use_kernels(self, engine: str) -> None:
        """Set the kernels of all layers: auto | triton | reference (key backend.kernels)."""


def build_model(config: ModelConfig) -> WorldModel:
    """Return the model `config.name`, parameters uninitialised, also under torch.device("meta").

    Raises ValueError with every broken rule of its configuration.
    """
    problems = [str(problem.under("model.")) for problem in broken_rules(config)]
    if problems:
        raise ValueError(f"model failed to build: {'; '.join(problems)}")
    model: WorldModel = builder(config)(config)
    return model
