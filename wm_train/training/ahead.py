"""Take the batches of a stage step by step, and make rollouts of a cycle of turns ahead of them.

Between two turns of the student its weights stay as they are. So with `distill.rollouts=ahead` the
clips of all turns up to the student's next one are rolled out together, each batch by itself, while
the student's sharded weights stay gathered. Every bit is that of rollouts made turn by turn.
Nothing of it is saved: a run that resumes makes the rest of a cycle's rollouts again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from data_shards.loading.load import Batch
from parallel.sharding import gathered
from parallel.timing import CommClock
from wm_train.config.roles import STUDENT, turn_of
from wm_train.config.schema import StageConfig
from wm_train.objectives.student_rollouts import make_rollouts
from wm_train.resilience.preemption import StopRequest
from wm_train.sampling.chunks import Rollouts
from wm_train.training.data import clips_of, micro_batches, on_device, role_turn
from wm_train.training.feed import Feed
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState

Taken = tuple[Batch, Sequence[Rollouts] | None]  # of each micro-batch; None: not made ahead


class Ahead:
    """Yield batches on the device, step by step. Every rank must take the same steps."""

    def __init__(self, stage: Stage, state: TrainState, feed: Feed, comm: CommClock) -> None:
        self._stage, self._state, self._feed, self._comm = stage, state, feed, comm
        self._ready = deque[Taken]()

    def take(self, step: int, stop: StopRequest) -> Taken | None:
        """Return the batch of step `step` (from 1) and its rollouts, if those are made ahead; None
        when a process was asked to stop."""
        if not self._ready:
            batches = self._fetch(last_ahead(self._stage.config, step) + 1 - step, stop)
            if batches is None:
                return None
            self._ready.extend(self._rolled_out(step, batches))
        return self._ready.popleft()

    def _fetch(self, count: int, stop: StopRequest) -> list[Batch] | None:
        found = []
        for _ in range(count):
            with self._comm.on_host():  # the wait for a rank whose data come late
                batch = self._feed.next_unless(stop)
            if batch is None:
                return None
            found.append(on_device(self._stage, batch))
        return found

    def _rolled_out(self, step: int, batches: Sequence[Batch]) -> list[Taken]:
        stage, distill = self._stage, self._stage.config.distill
        if distill is None or distill.rollouts == "each":
            return [(batch, None) for batch in batches]
        found: list[Taken] = []
        with gathered(self._state.model):
            for number, batch in enumerate(batches, step):
                turn = turn_of(stage.config.turns, number - 1)
                parts = micro_batches(stage, batch)
                made = [
                    make_rollouts(
                        self._state.model, clips_of(stage, part), role_turn(stage, part, turn)
                    )
                    for part in parts
                ]
                found.append((batch, made))
        return found


def last_ahead(config: StageConfig, step: int) -> int:
    """Return the last step whose rollouts may be made before step `step`, both from 1: that of the
    student's next turn, or the stage's last."""
    if config.distill is None or config.distill.rollouts == "each":
        return step
    later = range(step, config.steps)
    turns = (at for at in later if turn_of(config.turns, at - 1).role == STUDENT)
    return next(turns, config.steps)
