"""Configure the samplers, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wm_train.config.kinds import SamplerConfig


@dataclass(frozen=True)
class EulerConfig(SamplerConfig):
    """Euler steps of the whole clip at once, for bidirectional models."""

    builds: ClassVar[str] = "wm_train.sampling.sample:euler"

    name: str = "euler"


@dataclass(frozen=True)
class StreamConfig(SamplerConfig):
    """Euler steps chunk by chunk, the past clean and in a state: the way a chunk-causal model is
    deployed, and the only choice for one."""

    builds: ClassVar[str] = "wm_train.sampling.sample:stream"

    name: str = "stream"

    def chunked(self) -> bool:
        return True
