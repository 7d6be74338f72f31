"""Rewind training after too many bad steps to the checkpoint before them, dropping later
progress."""

from __future__ import annotations

from collections.abc import Callable

from wm_train.checkpoint import store
from wm_train.config.curriculum import StagePlan
from wm_train.resilience.guard import BadStepError, RewindError
from wm_train.training.resume import Start
from wm_train.training.state import TrainState
from wm_train.world import World


def rewind(
    plan: StagePlan,
    state: TrainState,
    request: RewindError,
    world: World,
    report: Callable[[str], None],
) -> Start:
    """Fill the state from the newest valid checkpoint before the first bad step; later checkpoints
    are withdrawn.

    Errors: BadStepError when there is no such checkpoint.
    """
    root = plan.checkpoints
    newest = store.find_newest(root, world, report, before=request.first, mine=True)
    if newest is None:
        raise BadStepError(
            f"{request.text}, and no checkpoint before step {request.first} to go back to. Fix:"
            " lower the learning rate"
        )
    folder, manifest = newest
    if world.rank == 0:
        for later in store.committed(root):
            if store.step_of(later) > manifest.step:
                store.withdraw(later)
    world.barrier()
    held = state.tensors()
    store.load(folder, manifest, held)
    state.put(held)
    memory = manifest.facts.get("guard", {})
    report(
        f"{request.text}: going back to step {manifest.step}; the batches of steps"
        f" {manifest.step + 1} to {request.last} are left out"
    )
    memory = {
        **memory,
        "skipped": [],
        "rewound": [*request.earlier, (manifest.step + 1, request.last)],
    }
    return Start(manifest.step, memory, quarantined=tuple(manifest.facts.get("quarantined", ())))
