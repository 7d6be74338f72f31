"""Which meshes are possible, in integers; `parallel.mesh` builds what passes here."""

from __future__ import annotations

from collections.abc import Iterable

from parallel.degrees import degree_problems, degrees_below_one, sequence_degrees, sequence_size
from wm_train.config.compose import Problem
from wm_train.config.schema import RunConfig

FOREIGN_ENGINES = ("deepspeed", "xfuser")  # parallel/engines.py, which imports torch


def mesh_problems(config: RunConfig) -> list[Problem]:
    """What keeps `launcher.workers` from being dp_replicate x dp_shard x ring x ulysses."""
    mesh, heads, workers = config.parallel, config.model.heads, config.launcher.workers
    countable = heads >= 1 and workers >= 1  # else reported as values
    problems = degree_problems(mesh, workers, heads) if countable else degrees_below_one(mesh)
    return [Problem(problem.key, problem.got, problem.rule, problem.fix) for problem in problems]


def batch_problems(config: RunConfig, stages: Iterable[str]) -> list[Problem]:
    """Every data-parallel member gets the same number of clips. Only for a mesh without
    problems."""
    members = config.launcher.workers // sequence_size(config.parallel)
    if members < 1:
        return []  # fewer than one worker: reported as a value
    found = []
    for name in stages:
        batch = config.recipe.stages[name].global_batch
        if batch >= 1 and batch % members:
            where = f"recipe.stages.{name}.global_batch"
            rule = f"a multiple of the {members} data-parallel members"
            fix = (
                f"{where}={-(-batch // members) * members}, or launcher.workers one of"
                f" {valid_worlds(config, batch)}"
            )
            found.append(Problem(where, str(batch), rule, fix))
    return found


def accumulate_problems(run: RunConfig, stage: str) -> list[Problem]:
    """Return the problem of a process that has fewer clips than parts to cut them into.

    run: as the stage sees it, with a batch without problems.
    """
    members = run.launcher.workers // sequence_size(run.parallel)
    clips = run.recipe.stages[stage].global_batch // max(members, 1)
    if clips < 1 or run.trainer.accumulate <= clips:
        return []
    rule = f"at most the {clips} clips that one process has of a step in stage {stage}"
    got, fix = str(run.trainer.accumulate), f"trainer.accumulate={clips}"
    return [Problem("trainer.accumulate", got, rule, fix)]


def engine_problems(run: RunConfig, stage: str) -> list[Problem]:
    """Return what `parallel.engines` would refuse in the first step, but for the clips' length.

    run: as the stage sees it. Without a sequence group, or without softmax blocks, no engine is
    asked; how many frames a clip has is for `data_rules`.
    """
    engine, heads = run.parallel.attention, run.model.heads
    if engine not in FOREIGN_ENGINES or sequence_size(run.parallel) == 1 or heads < 1:
        return []
    ring, ulysses = sequence_degrees(run.parallel, heads)
    softmax = 0 < run.model.softmax_every <= run.model.depth
    native = "parallel.attention=native"
    rules = (
        (
            engine == "deepspeed" and ring > 1,
            f"ring {ring}",
            "ring 1",
            f"{native} or parallel.ring=1",
        ),
        (softmax and run.model.causal, "a causal model", "one without model.causal", native),
        (
            softmax and run.data.pack,
            "packed rows",
            "one clip a row",
            f"{native} or data.pack=false",
        ),
        (softmax and heads % ulysses, f"{heads} heads", f"a multiple of ulysses {ulysses}", native),
    )
    where = "parallel.attention"
    return [
        Problem(where, f"{engine} with {got} in stage {stage}", f"{rule} for it", fix)
        for broken, got, rule, fix in rules
        if broken
    ]


def valid_worlds(config: RunConfig, global_batch: int) -> str:
    """Numbers of workers, up to 4096, whose data-parallel members share the batch evenly under this
    mesh."""
    replicas, size = config.parallel.dp_replicate, sequence_size(config.parallel)
    members = range(replicas, min(global_batch, 4096 // size) + 1, replicas)
    return ", ".join(str(size * count) for count in members if global_batch % count == 0)


def smaller_worlds(config: RunConfig, global_batch: int) -> tuple[int, ...]:
    """Numbers of workers below `launcher.workers` and not below `launcher.min_workers` that train
    the same: cp and dp_replicate stay, the global batch divides evenly. Largest first."""
    size, least = sequence_size(config.parallel), config.launcher.min_workers
    if least is None:
        return ()
    step = size * config.parallel.dp_replicate
    possible = range(config.launcher.workers - 1, least - 1, -1)
    return tuple(n for n in possible if n % step == 0 and global_batch % (n // size) == 0)
