"""Hold a measured number together with all that is needed to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000  # of a bootstrap interval
SHARES = (2.5, 97.5)  # per cent: its ends


@dataclass(frozen=True)
class Score:
    """Hold a number, or None and the reason why there is none.

    n: the items (frames, pairs, videos) that it is the mean of; coverage: their share of the items
    that should have been measured.
    """

    value: float | None
    n: int
    coverage: float
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """Hold the mean of a score over videos.

    n: videos with a value, of `videos`; coverage: mean over all videos of the share of each that
    was measured, 0 for one without a value; interval: 95 % bootstrap over videos, None below 2.
    """

    mean: float | None
    median: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    n: int
    videos: int
    coverage: float
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return asdict(self)


def unknown(reason: str) -> Score:
    """Return a score without a value."""
    return Score(None, 0, 0.0, reason)


def mean_score(values: ArrayLike, what: str, least: float = 0.0) -> Score:
    """Return the mean of the finite `values` [n]; NaN marks an item that could not be measured.

    least: the coverage below which there is no value. `what` names the items in the reason.
    """
    given = np.asarray(values, np.float64)
    known = given[np.isfinite(given)]
    coverage = len(known) / len(given) if len(given) else 0.0
    if not len(known) or coverage < least:
        rule = f"expected at least {least:.0%}" if least else "expected at least one"
        reason = f"{len(known)} of {len(given)} {what} could be measured, {rule}"
        return Score(None, len(known), coverage, reason)
    return Score(float(known.mean()), len(known), coverage)


def summarise(scores: Sequence[Score]) -> Summary:
    """Summarise the scores of videos, in a fixed order: the interval follows from the values and
    their order alone."""
    known = np.array([s.value for s in scores if s.value is not None], np.float64)
    shares = [score.coverage if score.value is not None else 0.0 for score in scores]
    coverage = float(np.mean(shares)) if shares else 0.0
    if not len(known):
        reasons = sorted({score.reason for score in scores if score.reason})
        return Summary(None, None, None, None, 0, len(scores), coverage, "; ".join(reasons[:3]))
    error = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
    return Summary(
        float(known.mean()),
        float(np.median(known)),
        error,
        bootstrap(known) if len(known) > 1 else None,
        len(known),
        len(scores),
        coverage,
    )


def bootstrap(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % percentile interval of the mean of `values` [n]."""
    picks = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), SHARES)
    return float(low), float(high)
