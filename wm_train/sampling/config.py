"""Configure the samplers, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wm_train.config.kinds import SamplerConfig


@dataclass(frozen=True)
class EulerConfig(SamplerConfig):
    """Configure Euler steps of the whole clip at once, for bidirectional models."""

    builds: ClassVar[str] = "wm_train.sampling.sample:euler"

    name: str = "euler"


@dataclass(frozen=True)
class StreamConfig(SamplerConfig):
    """Configure Euler steps chunk by chunk, with a clean past in a state, as chunk-causal models
    are deployed. Such a model accepts no other sampler."""

    builds: ClassVar[str] = "wm_train.sampling.sample:stream"

    name: str = "stream"

    def chunked(self) -> bool:
        return True
