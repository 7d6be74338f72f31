"""Profile on demand: `trainer.profile=10-15` records these steps of rank 0 as a trace.

The trace opens in chrome://tracing or Perfetto.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANGE = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")


def is_step_range(text: str | None) -> bool:
    """Return True if `text` is None, `10` or `10-15`."""
    found = text is None or RANGE.fullmatch(text)
    return found is True or bool(found and int(found[2] or found[1]) >= int(found[1]))


def steps_to_profile(text: str | None) -> range:
    """Convert `10-15` or `10` to a range of steps, None to an empty one."""
    found = RANGE.fullmatch(text or "")
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


class StepProfiler:
    """Profile a range of steps; call `before` and `after` at every step."""

    def __init__(self, steps: range, folder: Path, profiler: Callable[[], Any]) -> None:
        """Store the range. profiler: the backend's, with the interface of torch's profiler."""
        self.steps, self.folder, self._profiler = steps, folder, profiler
        self._profile: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        if step in self.steps and self._profile is None:
            self._profile, self._first = self._profiler(), step
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """Return the trace's path after its last step, else None."""
        if self._profile is None or step + 1 in self.steps:
            return None
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps_{self._first}-{step}.json.gz"
        plain = path.with_suffix("")
        self._profile.export_chrome_trace(str(plain))  # some profilers do not look at the name
        with plain.open("rb") as trace, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(trace, packed)
        plain.unlink()
        self._profile = None
        return path
