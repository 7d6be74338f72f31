"""Training objectives by name: function (model, batch, key, config, sequence, conditions) ->
ObjectiveOutput."""

from __future__ import annotations

from collections.abc import Callable

from wm_train.objectives.chunk_mixture import chunk_mixture
from wm_train.objectives.flow_matching import flow_matching
from wm_train.objectives.output import ObjectiveOutput, TrainingBatch

__all__ = ["OBJECTIVES", "ObjectiveOutput", "TrainingBatch"]

OBJECTIVES: dict[str, Callable[..., ObjectiveOutput]] = {
    "flow_matching": flow_matching,
    "chunk_mixture": chunk_mixture,
}
