"""Measure a step of this rank: waiting for data, waiting in communication, own work; host memory;
and how far successive gradients agree."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from parallel.timing import CommClock, time_sharding
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState


class StepClock:
    """Measure steps: call `begin`, take the step, call `end`. `last` is (data wait, own work) in
    seconds of the previous step, for the other ranks."""

    def __init__(self, stage: Stage, state: TrainState) -> None:
        self.comm = CommClock(stage.backend.device)
        self.last = (0.0, 0.0)
        self._begun = (0.0, 0.0, 0.0)
        self._direction: list[float] = []
        if stage.world.size > 1:
            time_sharding(state.model, self.comm, replicas=stage.mesh.degrees.dp_replicate > 1)
            if stage.mesh.comm is not None:
                stage.mesh.comm.clock = self.comm

    def begin(self) -> None:
        self._begun = (time.perf_counter(), time.process_time(), self.comm.seconds())

    def cosine(self, direction: Sequence[float]) -> float | None:
        """Return the cosine of this direction and that of the call before; None at the first."""
        before, self._direction = self._direction, list(direction)
        lengths = math.hypot(*before) * math.hypot(*direction)
        same = sum(a * b for a, b in zip(before, direction, strict=False))
        return same / lengths if lengths else None

    def end(self, data_wait_s: float) -> dict[str, float]:
        """Return the figures of the step that began at `begin`, whose device work is done;
        `data_wait_s` is this rank's."""
        started, cpu, comm = self._begun
        seconds, waited = time.perf_counter() - started, self.comm.seconds() - comm
        self.last = (data_wait_s, max(0.0, seconds - data_wait_s - waited))
        return {
            "step_s": seconds,
            "comm_share": waited / seconds,
            "cpu_cores": (time.process_time() - cpu) / seconds,
            "memory_host_bytes": resident_bytes(),
        }


def resident_bytes() -> int:
    """Return the host memory of this process in bytes (its peak where the system reports only
    that)."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(pages.read_text().split()[1]) * resource.getpagesize()
