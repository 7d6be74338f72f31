"""Write what a command has made when its stages have ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wm_train.checkpoint.manifest import committed
from wm_train.config.curriculum import StagePlan


def summary(stages: Sequence[StagePlan], mlflow: str = "") -> str:
    """Return the paths of the results, as lines of text. mlflow: where MLflow keeps the run."""
    last = stages[-1]
    lines = [
        "done:"
        f" {f'pool {last.pool}, ' if last.pool else ''}"
        f"{', '.join(stage.stage for stage in stages)}"
    ]
    if saved := committed(last.checkpoints):
        newest = saved[-1]
        shown = newest.absolute() if isinstance(newest, Path) else newest
        lines.append(f"  checkpoint  {shown}")
    lines += [
        f"  samples     {sheet}"
        for stage in stages
        for sheet in sorted((stage.directory.absolute() / "samples").glob("*.png"))
    ]
    if mlflow:
        lines.append(f"  MLflow      {mlflow}")
    return "\n".join(lines)
