"""Print and draw a recipe over numbers of devices: `plan --gpus 8..10000 --picture FILE.png`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.plan.latents import Frame
from wm_train.plan.scaling.picture import draw
from wm_train.plan.scaling.points import Assumptions, points_of, table
from wm_train.plan.search.candidates import batch_lines


def print_scaling(
    recipe: str,
    plans: Sequence[StagePlan],
    frames: Mapping[str, Frame],
    hardware: Hardware,
    counts: Sequence[int],
    path: Path,
    processes: int = 1,
) -> int:
    """Print the table, and write the picture; exit code 2 where there is nothing to draw or no
    place to write."""
    assumed = Assumptions()
    for plan in plans:
        print(f"stage {plan.config.index} {plan.stage}:", *batch_lines(plan, counts[-1]), sep="\n")
    points, left_out = points_of(plans, frames, hardware, counts, assumed, processes)
    if not points:
        print("\n".join(left_out), file=sys.stderr)
        return 2
    title = f"{recipe} on {hardware.name}, {counts[0]:,} to {counts[-1]:,} devices"
    notes = [*assumed.lines(), *left_out]
    print("\n".join([title, *table(points), "assumptions:", *(f"  {note}" for note in notes)]))
    try:
        draw(points, title, notes, path)
    except OSError as error:
        print(
            f"--picture: got {error}, expected to write {path}. Fix: another path", file=sys.stderr
        )
        return 2
    print(f"drawn: {path}")
    return 0
