"""Which meshes are possible, in integers; `parallel.mesh` builds what passes here."""

from __future__ import annotations

import math
from collections.abc import Iterable

from wm_train.compose import Problem
from wm_train.config import RunConfig


def mesh_problems(config: RunConfig) -> list[Problem]:
    """What keeps `launcher.workers` from being dp_replicate x dp_shard x ring x ulysses."""
    mesh, heads, workers = config.parallel, config.model.heads, config.launcher.workers
    given = {"dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "cp": mesh.cp, "ulysses": mesh.ulysses, "ring": mesh.ring}
    found = [
        Problem(f"parallel.{key}", str(value), "a whole number from 1", f"parallel.{key}=1")
        for key, value in given.items()
        if value is not None and value < 1
    ]
    if found or heads < 1 or workers < 1:
        return found
    ulysses = mesh.ulysses or (max(1, mesh.cp // mesh.ring) if mesh.ring else math.gcd(heads, mesh.cp))
    ring = mesh.ring or max(1, mesh.cp // ulysses)
    if ulysses * ring != mesh.cp:
        rule = f"ulysses x ring = cp = {mesh.cp}"
        fix = f"parallel.ulysses={math.gcd(heads, mesh.cp)} parallel.ring={mesh.cp // math.gcd(heads, mesh.cp)}"
        found.append(Problem("parallel.ulysses", f"{ulysses} x ring {ring}", rule, fix))
    if heads % ulysses:
        valid = ", ".join(str(degree) for degree in divisors(heads))
        rule = f"a divisor of the model's {heads} heads: {valid}"
        found.append(Problem("parallel.ulysses", str(ulysses), rule, f"parallel.ulysses={math.gcd(heads, mesh.cp)}"))
    claimed = mesh.dp_replicate * mesh.cp * (mesh.dp_shard or 1)
    if (workers % claimed if mesh.dp_shard is None else workers != claimed) != 0:
        shard = "dp_shard (free)" if mesh.dp_shard is None else f"dp_shard {mesh.dp_shard}"
        got = f"dp_replicate {mesh.dp_replicate} x {shard} x cp {mesh.cp}"
        if mesh.dp_shard is None and mesh.dp_replicate == 1:
            valid = ", ".join(str(degree) for degree in divisors(workers))
            found.append(
                Problem("parallel.cp", str(mesh.cp), f"a divisor of the {workers} workers: {valid}", f"launcher.workers={mesh.cp}")
            )
        else:
            found.append(Problem("parallel", got, f"a product that makes the {workers} workers", f"launcher.workers={claimed}"))
    return found


def batch_problems(config: RunConfig, stages: Iterable[str]) -> list[Problem]:
    """Every data-parallel member gets the same number of clips. Only for a mesh without problems."""
    members = config.launcher.workers // config.parallel.cp
    if members < 1:
        return []  # fewer than one worker: reported as a value
    found = []
    for name in stages:
        batch = config.recipe.stages[name].global_batch
        if batch >= 1 and batch % members:
            where = f"recipe.stages.{name}.global_batch"
            rule = f"a multiple of the {members} data-parallel members"
            fix = f"{where}={-(-batch // members) * members}, or launcher.workers one of {valid_worlds(config, batch)}"
            found.append(Problem(where, str(batch), rule, fix))
    return found


def valid_worlds(config: RunConfig, global_batch: int) -> str:
    """Numbers of workers, up to 4096, whose data-parallel members share the batch evenly under this mesh."""
    mesh = config.parallel
    members = range(mesh.dp_replicate, min(global_batch, 4096 // mesh.cp) + 1, mesh.dp_replicate)
    return ", ".join(str(mesh.cp * count) for count in members if global_batch % count == 0)


def smaller_worlds(config: RunConfig, global_batch: int) -> tuple[int, ...]:
    """Numbers of workers below `launcher.workers` and not below `launcher.min_workers` that train the same: cp and dp_replicate stay, the
    global batch divides evenly. Largest first."""
    mesh, least = config.parallel, config.launcher.min_workers
    if least is None:
        return ()
    step = mesh.cp * mesh.dp_replicate
    possible = range(config.launcher.workers - 1, least - 1, -1)
    return tuple(workers for workers in possible if workers % step == 0 and global_batch % (workers // mesh.cp) == 0)


def divisors(number: int) -> list[int]:
    return [degree for degree in range(1, min(number, 4096) + 1) if number % degree == 0]
