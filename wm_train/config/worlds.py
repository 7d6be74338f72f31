"""Count the numbers of workers on which a stage trains the same."""

from __future__ import annotations

from parallel.degrees import sequence_size
from wm_train.config.curriculum import StagePlan
from wm_train.config.schema import ParallelConfig


def valid_worlds(mesh: ParallelConfig, global_batch: int) -> str:
    """Return the numbers of workers, up to 4096, whose data-parallel ranks share the batch evenly
    under this mesh."""
    replicas, size = mesh.dp_replicate, sequence_size(mesh)
    ranks = range(replicas, min(global_batch, 4096 // size) + 1, replicas)
    return ", ".join(str(size * count) for count in ranks if global_batch % count == 0)


def smaller_worlds(plan: StagePlan) -> tuple[int, ...]:
    """Return the numbers of workers below `launcher.workers` and not below `launcher.min_workers`
    that train the same, largest first: cp and dp_replicate stay, the batch divides evenly."""
    mesh, least = plan.config.parallel, plan.launcher.min_workers
    if least is None:
        return ()
    size = sequence_size(mesh)
    possible = range(plan.launcher.workers - 1, least - 1, -1)
    batch = plan.config.global_batch
    fits = (n for n in possible if n % (size * mesh.dp_replicate) == 0)
    return tuple(n for n in fits if batch % (n // size) == 0)
