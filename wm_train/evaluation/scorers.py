"""Score frames, pairs of frames and videos with parts that may need weights.

A row of a table maps a name to "module:function"; another package adds one by an entry point of the
groups `wm_train.frame_scorers`, `wm_train.pair_scorers` and `wm_train.video_features`. The function
takes no argument and raises `MissingWeights` where its package or its weights are not installed:
results then say so instead of a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_shards.registry import Registry, load
from data_shards.schema import DataError
from wm_train.evaluation.metrics import pictures

FRAME_SCORERS = Registry(
    "frame scorer", "wm_train.frame_scorers", {"musiq": "wm_train.evaluation.scorers:musiq"}
)
PAIR_SCORERS = Registry(
    "pair scorer",
    "wm_train.pair_scorers",
    {
        "psnr": "wm_train.evaluation.scorers:psnr",
        "ssim": "wm_train.evaluation.scorers:ssim",
        "lpips": "wm_train.evaluation.scorers:lpips",
    },
)
VIDEO_FEATURES = Registry("video features", "wm_train.video_features", {})


class MissingWeights(Exception):
    """Report a scorer whose package or weights are not installed."""


class FrameScorer(Protocol):
    """Score single pictures; `weights`: file name -> sha256 of what it loaded."""

    weights: Mapping[str, str]

    def score(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return [N] scores of [N, H, W, 3] pictures."""
        ...


class PairScorer(Protocol):
    """Compare pictures two by two; `weights`: file name -> sha256 of what it loaded."""

    weights: Mapping[str, str]

    def compare(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return [N] of pictures [N, H, W, 3] each."""
        ...


class VideoFeatures(Protocol):
    """Turn videos into features, for the Fréchet distance; `weights` as above."""

    weights: Mapping[str, str]

    def features(self, videos: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """Return [N, D] of N videos [F, H, W, 3] each."""
        ...


@dataclass(frozen=True)
class ExactPairs:
    """Compare pairs by a formula, which needs no weights."""

    formula: pictures.Compare
    weights: Mapping[str, str] = field(default_factory=dict)

    def compare(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return [N] of pictures [N, H, W, 3] each."""
        return pictures.by_frame(a, b, self.formula)


def psnr() -> PairScorer:
    """Build the peak signal-to-noise ratio."""
    return ExactPairs(pictures.psnr)


def ssim() -> PairScorer:
    """Build the structural similarity."""
    return ExactPairs(pictures.ssim)


def musiq() -> FrameScorer:
    """Refuse, as MUSIQ's weights are not part of this package (VBench's imaging quality)."""
    raise MissingWeights(
        "musiq needs pyiqa and MUSIQ-SPAQ's weights, which are not part of this package. Fix: a"
        f" package with an entry point of {FRAME_SCORERS.group}"
    )


def lpips() -> PairScorer:
    """Refuse, as the AlexNet trunk of LPIPS is not part of this package."""
    raise MissingWeights(
        "lpips needs the weights of AlexNet, which are not part of this package. Fix: a package"
        f" with an entry point of {PAIR_SCORERS.group}"
    )


def make_scorer(registry: Registry, name: str, strict: bool = False) -> tuple[Any | None, str]:
    """Return the scorer called `name` and "", or None and the reason why it is missing.

    Raises DataError for an unknown name; with `strict` for a missing one too.
    """
    builder = load(registry, name)
    try:
        return builder(), ""
    except MissingWeights as error:
        if strict:
            raise DataError(f"{registry.what}: {error} (strict=true)") from error
        return None, str(error)
