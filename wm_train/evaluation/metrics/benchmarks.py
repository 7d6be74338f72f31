"""Combine the dimensions of VBench into one number, as two papers do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wm_train.evaluation.metrics.score import Score, unknown

# dimension -> (lowest, highest, weight): VBench's quality group as the public SANA-WM evaluator has
# it; overall consistency is not in it
QUALITY: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "subject_consistency": (0.1462, 1.0, 1.0),
        "background_consistency": (0.2615, 1.0, 1.0),
        "temporal_flickering": (0.6293, 1.0, 1.0),
        "motion_smoothness": (0.7060, 0.9975, 1.0),
        "aesthetic_quality": (0.0, 1.0, 1.0),
        "imaging_quality": (0.0, 1.0, 1.0),
        "dynamic_degree": (0.0, 1.0, 0.5),
    }
)
MOWORLD = tuple(name for name in QUALITY if name != "temporal_flickering")
IMAGE_TO_VIDEO = ("i2v_subject", "i2v_background")


def vbench_overall(scores: Mapping[str, float]) -> Score:
    """Return VBench Overall of SANA-WM's tables, 0 to 100, from raw dimensions on 0..1."""
    if missing := [name for name in QUALITY if name not in scores]:
        return lacking(missing)
    total = weight = 0.0
    for name, (low, high, share) in QUALITY.items():
        total += share * min(1.0, max(0.0, (scores[name] - low) / (high - low)))
        weight += share
    return Score(100 * total / weight, len(QUALITY), 1.0)


def moworld_quality(scores: Mapping[str, float]) -> Score:
    """Return Quality of MoWorld's table (§6.1), 0 to 100: raw dimensions, dynamic degree half."""
    if missing := [name for name in MOWORLD if name not in scores]:
        return lacking(missing)
    weights = [QUALITY[name][2] for name in MOWORLD]
    total = sum(weight * scores[name] for name, weight in zip(MOWORLD, weights, strict=True))
    return Score(100 * total / sum(weights), len(MOWORLD), 1.0)


def moworld_average(scores: Mapping[str, float]) -> Score:
    """Return Average of MoWorld's table (§6.1): the plain mean of its eight raw dimensions, 0 to
    100."""
    names = (*MOWORLD, *IMAGE_TO_VIDEO)
    if missing := [name for name in names if name not in scores]:
        return lacking(missing)
    return Score(100 * sum(scores[name] for name in names) / len(names), len(names), 1.0)


def lacking(names: list[str]) -> Score:
    """Return a score without a value, as these dimensions are not there."""
    return unknown(f"VBench dimensions are missing: {', '.join(names)}")
