"""Configure several experts as one network: a model for each part of the noise levels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, ClassVar

from wm_train.config.kinds import ModelConfig, Needs
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import Rule

FALLING = Rule(
    lambda levels: levels[-1:] == (0.0,) and all(a > b for a, b in pairwise((1.0, *levels))),
    "noise levels that fall from below 1 to 0, one for each expert",
)


@dataclass(frozen=True)
class ExpertsConfig(ModelConfig):
    """Configure the experts of a run's pools as one network, whose parameters have the pool's name
    before their own. A stage with pools=together makes it of the pools' models."""

    builds: ClassVar[str] = "wm_train.models.experts.model:ExpertsModel"

    name: str = "experts"
    experts: dict[str, ModelConfig] = field(default_factory=dict)
    # the noise level from which each is used, in the order of `experts`
    boundaries: Annotated[tuple[float, ...], FALLING] = (0.0,)

    def __hash__(self) -> int:
        """Return a hash, as counts of FLOPs are kept by model."""
        return hash((tuple(self.experts.items()), self.boundaries))

    def needs(self) -> Needs:
        """Return the facts of the first expert; the others have the same."""
        first = next(iter(self.experts.values()), None)
        return first.needs() if first else Needs(1, 1, self.latent_channels, 1, frozenset())

    def checkpointing(self) -> frozenset[str]:
        """Return the ways in which blocks of some expert are computed again."""
        return frozenset[str]().union(*(one.checkpointing() for one in self.experts.values()))

    def blocks(self) -> tuple[int, int]:
        """Return the blocks of each expert, (0, 0) for experts of several depths."""
        found = {model.blocks() for model in self.experts.values()}
        return found.pop() if len(found) == 1 else (0, 0)

    def with_blocks(self, count: int) -> ExpertsConfig:
        """Return the model with so many blocks in each expert."""
        experts = {name: model.with_blocks(count) for name, model in self.experts.items()}
        return replace(self, experts=experts)

    def other_shapes(self, other: ModelConfig) -> list[str]:
        """Return the keys in which two networks of experts differ such that their parameters may
        not be the same, "experts.high.width", or "experts" where these are other ones."""
        if not isinstance(other, ExpertsConfig):
            return ["name"]
        if list(self.experts) != list(other.experts):
            return ["experts"]
        found = ["boundaries"] if self.boundaries != other.boundaries else []
        for name, model in self.experts.items():
            keys = model.other_shapes(other.experts[name])
            found += [f"experts.{name}.{key}" for key in keys]
        return found

    def problems(self) -> Iterator[Problem]:
        """Yield experts without a boundary, and such that cannot see the same clips."""
        if len(self.experts) != len(self.boundaries) or not self.experts:
            rule = f"one for each of the {len(self.boundaries)} boundaries"
            got = ", ".join(self.experts) or "none"
            yield Problem("experts", got, rule, f"{AT}name=<another model>")
        if len({model.needs() for model in self.experts.values()}) > 1:
            rule = "models that read the same of a clip, as their pools train on the same"
            yield Problem("experts", ", ".join(self.experts), rule, "the same model for all pools")
