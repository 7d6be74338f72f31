"""Judge a stage's mesh in integers; `parallel.mesh` builds what passes here."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.degrees import degree_problems, degrees_below_one, sequence_degrees, sequence_size
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import AT, Problem
from wm_train.config.worlds import valid_worlds

FOREIGN_ENGINES = ("deepspeed", "xfuser")  # parallel/engines.py, which imports torch


def mesh_problems(plan: StagePlan) -> list[Problem]:
    """Return what keeps the stage from running on its workers; keys relative to the stage."""
    mesh, needs = plan.config.parallel, plan.config.model.needs()
    countable = needs.heads >= 1 and plan.launcher.workers >= 1  # else reported as values
    wrong = (
        degree_problems(mesh, plan.launcher.workers, needs.heads, needs.key_heads)
        if countable
        else degrees_below_one(mesh)
    )
    problems = [
        Problem(p.key, p.got, p.rule, p.fix.replace("parallel.", f"{AT}parallel.")) for p in wrong
    ]
    if problems or not countable:
        return problems
    problems = list(_worker_problems(plan))
    shares = list(_batch_problems(plan)) or list(_accumulate_problems(plan))
    return [*problems, *shares, *_engine_problems(plan)]


def _worker_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield workers of the stage alone that its launcher cannot place."""
    launcher, workers = plan.launcher, plan.config.workers
    if workers is None or workers > launcher.workers:
        return
    by_torchrun = (
        launcher.slurm.runner if launcher.name == "slurm" else launcher.name
    ) == "torchrun"
    if launcher.name == "torchrun" and launcher.endpoint:
        rule = "null under torchrun on several machines, each of which was told to take part"
        yield Problem("workers", str(workers), rule, f"{AT}workers=null")
    elif by_torchrun and workers % launcher.nodes:
        rule = f"a multiple of the {launcher.nodes} nodes that hold them"
        yield Problem("workers", str(workers), rule, f"{AT}workers={launcher.nodes}")


def _batch_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield a batch that does not divide evenly over the data-parallel ranks."""
    ranks, batch = _data_ranks(plan), plan.config.global_batch
    if batch >= 1 and batch % ranks:
        worlds = valid_worlds(plan.config.parallel, batch)
        rule = f"a multiple of the {ranks} data-parallel members"
        fix = f"{AT}global_batch={-(-batch // ranks) * ranks}, or launcher.workers one of {worlds}"
        yield Problem("global_batch", str(batch), rule, fix)


def _accumulate_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield a number of micro-batches above the clips that one rank has."""
    clips = plan.config.global_batch // _data_ranks(plan)
    parts = plan.config.trainer.accumulate
    if 1 <= clips < parts:
        rule = f"at most the {clips} clips that one process has of a step in stage {plan.stage}"
        yield Problem("trainer.accumulate", str(parts), rule, f"{AT}trainer.accumulate={clips}")


def _data_ranks(plan: StagePlan) -> int:
    return max(1, plan.launcher.workers // sequence_size(plan.config.parallel))


def _engine_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield what `parallel.engines` would refuse in the first step, except for the clips' length.

    An engine runs only with a sequence group and softmax blocks; the number of frames of a clip
    is checked in `checks.data`.
    """
    stage, needs = plan.config, plan.config.model.needs()
    engine = stage.parallel.attention
    if engine not in FOREIGN_ENGINES or sequence_size(stage.parallel) == 1:
        return
    ring, ulysses = sequence_degrees(stage.parallel, needs.heads, needs.key_heads)
    native = f"{AT}parallel.attention=native"
    no_ring, no_pack = f"{native} or {AT}parallel.ring=1", f"{native} or {AT}data.pack=false"
    shared = f"a multiple of ulysses {ulysses}"
    rules = (
        (engine == "deepspeed" and ring > 1, f"ring {ring}", "ring 1", no_ring),
        (needs.softmax and needs.causal, "a causal model", "a model that is not causal", native),
        (needs.softmax and stage.data.pack, "packed rows", "one clip a row", no_pack),
        (needs.softmax and needs.heads % ulysses, f"{needs.heads} heads", shared, native),
    )
    for broken, got, rule, fix in rules:
        if broken:
            words = f"{engine} with {got} in stage {plan.stage}"
            yield Problem("parallel.attention", words, f"{rule} for it", fix)
