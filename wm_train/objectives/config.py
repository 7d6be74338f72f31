"""Configure the objectives: their keys and rules, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Self

from wm_train.config.kinds import HistoryConfig, ObjectiveConfig, falls_from_one
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import AtLeastZero, Finite, Positive, Rule, Share

HELD_OUT_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
OWN_LEVELS = (
    1 / 6,
    1 / 2,
    5 / 6,
)  # shares of a narrow range at which its held-out loss is measured
LEAST_SHARE = 1e-3  # of the noise distribution, below which a range is taken for a mistake
SHARES = Rule(
    lambda shares: all(x >= 0 for x in shares) and 0 < sum(shares) < math.inf,
    "four shares, not all 0",
)

FALLING = Rule(falls_from_one, "noise levels that fall from 1 to above 0")


@dataclass(frozen=True)
class FlowMatchingConfig(ObjectiveConfig):
    """Configure rectified-flow matching: the noise levels that are drawn, and the dropped
    conditions."""

    builds: ClassVar[str] = "wm_train.objectives.flow_matching:flow_matching"

    name: str = "flow_matching"
    sigma_mean: Finite = 0.0  # logit-normal: sigma = sigmoid(mean + std * normal), then shifted
    sigma_std: Positive = 1.0
    flow_shift: Positive = 1.0  # sigma -> shift * sigma / (1 + (shift - 1) * sigma)
    # only noise levels of this range, after the shift, are drawn: as the untruncated ones fall
    # inside it
    sigma_min: Share = 0.0
    sigma_max: Share = 1.0
    # share of clips that see their first latent frame clean (sigma 0, no loss)
    image_condition: Share = 1.0
    camera_dropout: Share = 0.0
    text_dropout: Share = 0.0

    def noise_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def narrowed(self, low: float | None, high: float | None) -> Self:
        low = self.sigma_min if low is None else max(low, self.sigma_min)
        high = self.sigma_max if high is None else min(high, self.sigma_max)
        return replace(self, sigma_min=low, sigma_max=high)

    def held_out_levels(self) -> tuple[float, ...]:
        """Return the levels of the grid inside the trained range, its lower end excluded; for a
        range with fewer than two of them, three of its own."""
        low, high = self.noise_range()
        inside = tuple(sigma for sigma in HELD_OUT_LEVELS if low < sigma <= high)
        own = tuple(round(low + (high - low) * share, 4) for share in OWN_LEVELS)
        return inside if len(inside) > 1 else own

    def held_out(self, sigma: float) -> Self:
        return replace(
            self,
            sigma_mean=math.log(sigma / (1 - sigma)),
            sigma_std=0.0,
            flow_shift=1.0,
            sigma_min=0.0,
            sigma_max=1.0,
            image_condition=1.0 if self.image_condition else 0.0,
            camera_dropout=0.0,
            text_dropout=0.0,
        )

    def sampling_shift(self) -> float:
        return self.flow_shift

    def gives_first_frame(self) -> bool:
        return self.image_condition > 0

    def dropped(self) -> dict[str, float]:
        return {"camera": self.camera_dropout, "text": self.text_dropout}

    def problems(self) -> Iterator[Problem]:
        """Yield a range of noise levels that the distribution never, or hardly ever, reaches."""
        share = range_share(self)
        if share < LEAST_SHARE:
            got = (
                f"{self.sigma_min} to {self.sigma_max}, which holds {share:.2g} of the noise levels"
            )
            rule = (
                f"a rising range with at least {LEAST_SHARE:g} of them, see sigma_mean, sigma_std"
                " and flow_shift"
            )
            fix = f"{AT}sigma_min=0 {AT}sigma_max=1, or pools.<pool>.sigma_min"
            yield Problem("sigma_min", got, rule, fix)


@dataclass(frozen=True)
class ChunkMixtureConfig(FlowMatchingConfig):
    """Configure flow matching with a noise level per chunk (SANA-WM §3.2)."""

    builds: ClassVar[str] = "wm_train.objectives.chunk_mixture:chunk_mixture"

    name: str = "chunk_mixture"
    # shares of: one sigma, rising from any chunk, rising to the last chunk, clean past
    chunk_mixture: Annotated[tuple[float, float, float, float], SHARES] = (0.1, 0.4, 0.4, 0.1)

    def needs_chunks(self) -> bool:
        return True


@dataclass(frozen=True)
class ArFlowMatchingConfig(FlowMatchingConfig):
    """Configure flow matching of one chunk of a clip behind a history of true frames, with an
    anchor (MoWorld §4.2)."""

    builds: ClassVar[str] = "wm_train.objectives.ar_flow_matching:ar_flow_matching"

    name: str = "ar_flow_matching"
    image_condition: Share = 0.0
    history: HistoryConfig = field(default_factory=HistoryConfig)
    anchor_weight: AtLeastZero = 1.0  # lambda, of the error of the anchor's clean prediction
    anchor_in_fm: bool = False  # whether the anchor counts in the flow-matching loss, too

    def windows(self) -> HistoryConfig | None:
        return self.history

    def problems(self) -> Iterator[Problem]:
        """Yield what the base yields, and a first frame that is given twice."""
        yield from super().problems()
        if self.image_condition:
            rule = f"0 with {self.name}, whose history begins with the first frame"
            got = f"{self.image_condition:g}"
            yield Problem("image_condition", got, rule, f"{AT}image_condition=0")


@dataclass(frozen=True)
class OdeRegressionConfig(ObjectiveConfig):
    """Configure regression on a teacher's trajectories, the start of a few-step student."""

    builds: ClassVar[str] = "wm_train.objectives.ode_regression:ode_regression"

    name: str = "ode_regression"
    levels: Annotated[tuple[float, ...], FALLING] = (1.0, 0.75, 0.5, 0.25)  # of the student

    def trajectory_levels(self) -> tuple[float, ...]:
        return self.levels


@dataclass(frozen=True)
class DistributionMatchingConfig(ObjectiveConfig):
    """Choose distribution matching on a student's rollouts, which `distill` of the stage
    configures."""

    builds: ClassVar[str] = "wm_train.objectives.distribution_matching:distribution_matching"

    name: str = "distribution_matching"

    def gives_first_frame(self) -> bool:
        """Return False: the first frame comes as each network takes it."""
        return False

    def several_networks(self) -> bool:
        return True

    def reads_first_frame_only(self) -> bool:
        return True


def range_share(noise: FlowMatchingConfig) -> float:
    """Return the share of the noise distribution between sigma_min and sigma_max, 0 to 1; 0 for an
    empty range."""
    if not 0 <= noise.sigma_min < noise.sigma_max <= 1:
        return 0.0

    def below(sigma: float) -> float:
        plain = sigma / (noise.flow_shift - (noise.flow_shift - 1) * sigma)
        if plain <= 0 or plain >= 1:
            return float(plain >= 1)
        logit = math.log(plain / (1 - plain))
        return 0.5 * (1 + math.erf((logit - noise.sigma_mean) / (noise.sigma_std * math.sqrt(2))))

    return below(noise.sigma_max) - below(noise.sigma_min)
