"""Configure the samplers, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from wm_train.config.kinds import HistoryConfig, SamplerConfig
from wm_train.config.rules import Below1, one_of


@dataclass(frozen=True)
class EulerConfig(SamplerConfig):
    """Configure Euler steps of the whole clip at once, for bidirectional models."""

    builds: ClassVar[str] = "wm_train.sampling.sample:euler"

    name: str = "euler"


@dataclass(frozen=True)
class RenoiseConfig(SamplerConfig):
    """Configure steps of the whole clip at once, each of which mixes the clean prediction with
    fresh noise, for bidirectional models that were distilled to a few steps."""

    builds: ClassVar[str] = "wm_train.sampling.sample:renoise"

    name: str = "renoise"


@dataclass(frozen=True)
class StreamConfig(SamplerConfig):
    """Configure steps chunk by chunk, with the past in a state, as chunk-causal models are
    deployed. Such a model accepts no other sampler."""

    builds: ClassVar[str] = "wm_train.sampling.sample:stream"

    name: str = "stream"
    # euler: follow the flow; renoise: mix the clean prediction with fresh noise, as students of
    # self-forcing are trained
    step: Annotated[str, one_of("euler", "renoise")] = "euler"
    context_sigma: Below1 = 0.0  # noise level of a finished chunk as the past of the next

    def chunked(self) -> bool:
        return True

    def step_rule(self) -> str:
        return self.step


@dataclass(frozen=True)
class WindowsConfig(SamplerConfig):
    """Configure steps chunk by chunk for bidirectional models, each chunk in a window with some of
    the frames before it (MoWorld §4.2), as such models are trained and deployed."""

    builds: ClassVar[str] = "wm_train.sampling.sample:windows"

    name: str = "windows"
    # euler: follow the flow; renoise: mix the clean prediction with fresh noise
    step: Annotated[str, one_of("euler", "renoise")] = "euler"
    history: HistoryConfig = field(default_factory=HistoryConfig)

    def windows(self) -> HistoryConfig | None:
        return self.history

    def step_rule(self) -> str:
        return self.step
