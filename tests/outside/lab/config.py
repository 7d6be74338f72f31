"""Configure a laboratory's own model, objective, optimizer and sampler, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from wm_train.config.kinds import (
    ModelConfig,
    Needs,
    ObjectiveConfig,
    OptimizerConfig,
    SamplerConfig,
)
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import AtLeastZero, Below1, Count, CountOrZero, NoiseLevel


@dataclass(frozen=True)
class AttentionConfig(ModelConfig):
    """An attention-only model that is played by buttons."""

    builds: ClassVar[str] = "lab.model:AttentionWorld"
    keys: ClassVar[Mapping[str, str]] = {"patch": "cell", "control_width": "buttons"}

    name: str = "lab_attention"
    layers: Count = 2
    channels: Count = 32
    queries: Count = 2  # heads
    cell: Count = 2  # latent pixels of a token's side
    buttons: CountOrZero = 0  # A of the data set's controls; 0 = none are read

    def needs(self) -> Needs:
        """Return what others must know of the model."""
        return Needs(
            heads=self.queries,
            key_heads=self.queries,
            latent_channels=self.latent_channels,
            patch=self.cell,
            fields=frozenset({"controls"} if self.buttons else ()),
            control_width=self.buttons,
        )

    def problems(self) -> Iterator[Problem]:
        """Yield a width that does not split into heads of whole pairs."""
        if self.channels % (2 * self.queries):
            rule = f"a multiple of {2 * self.queries}"
            fix = f"{AT}channels={2 * self.queries}"
            yield Problem("channels", str(self.channels), rule, fix)


@dataclass(frozen=True)
class HollowConfig(AttentionConfig):
    """A model whose code was forgotten."""

    builds: ClassVar[str] = "lab.nowhere:Model"

    name: str = "lab_hollow"


@dataclass(frozen=True)
class ForcingConfig(ObjectiveConfig):
    """Diffusion forcing: a noise level of its own for each latent frame."""

    builds: ClassVar[str] = "lab.forcing:forcing"

    name: str = "lab_forcing"
    lowest: NoiseLevel = 0.05  # noise level


@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023)."""

    builds: ClassVar[str] = "lab.lion:build"

    name: str = "lab_lion"
    lr: float = 3e-4
    now: Below1 = 0.9  # share of the momentum in an update
    later: Below1 = 0.99  # share of the momentum that stays
    decay: AtLeastZero = 0.01


@dataclass(frozen=True)
class MidpointConfig(SamplerConfig):
    """The midpoint rule: two passes of the model a step."""

    builds: ClassVar[str] = "lab.midpoint:midpoint"

    name: str = "lab_midpoint"
