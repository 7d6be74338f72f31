"""Report step (h): what the product does not have yet, Waypoint's sparse attention and a
distillation turn."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from device_steps.day import Day
from measuring import Row

EXPECTED = {
    "Waypoint's sparse attention": "wm_train.models.waypoint",
    "a distillation turn": "wm_train.training.turns",
}


def rows(day: Day) -> Iterator[Row]:
    """Yield one row each: absent, or a failure that asks for its measurement once it exists."""
    for what, module in EXPECTED.items():
        if find_spec(module) is None:
            yield Row("h", what, verdict="absent", note=f"{module} does not exist yet")
        else:
            note = f"{module} exists: add its measurement to benchmarks/device_steps/later.py"
            yield Row("h", what, verdict="failed", note=note)
