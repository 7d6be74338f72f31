"""Check the sources of weights and the destination of checkpoints, as far as the store shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_shards.encoding.derived import is_complete
from data_shards.weight_files import is_release
from wm_train.checkpoint.manifest import committed
from wm_train.config.curriculum import PREVIOUS, Source, StagePlan, checkpoints_of, ordered
from wm_train.config.problems import AT, COMMAND, Problem
from wm_train.config.schema import RunConfig
from wm_train.tracking.mlflow_record import METRICS


def inherit_problems(config: RunConfig, plans: Iterable[StagePlan]) -> list[Problem]:
    """Return the networks without weights to start from: nothing is there, no earlier stage of this
    very command makes them, and the stage is not to be resumed. Those that do not train are in no
    checkpoint, so they need their source then, too."""
    problems: list[Problem] = []
    planned: list[str] = []
    for plan in plans:
        planned.append(plan.stage)
        where = f"recipe.stages.{plan.stage}."
        rows = [(f"{where}inherit", plan.source, True)]
        for role, source in plan.role_sources.items():
            saved = plan.config.roles[role].optimizer is not None
            rows.append((f"{where}roles.{role}.inherit", source, saved))
        made = plan.config.trajectories and is_complete(plan.config.data.path)
        if plan.teacher_source and not made:
            rows.append((f"{where}trajectories.teacher.inherit", plan.teacher_source, False))
        for key, source, saved in rows:
            if source is not None and source.stage not in planned:
                problems += _source_problems(config, plan, key, source, saved)
    return problems


def _source_problems(
    config: RunConfig, plan: StagePlan, where: str, source: Source, saved: bool
) -> Iterator[Problem]:
    place = source.checkpoints
    try:
        resumed = saved and plan.resume and committed(plan.checkpoints)
        if resumed or committed(place) or (isinstance(place, Path) and is_release(place)):
            return
        fix = "the folder that holds step_*"
        if source.stage:
            missing = untrained(config, source.stage)
            fix = f"train what comes before it: {COMMAND} stage={missing}"
    except OSError as error:
        rule = "a store that can be reached"
        yield Problem(where, str(error), rule, "check the address and your credentials")
        return
    rule = "a folder with checkpoints (step_*), or of a public one (config.json or config.yaml)"
    yield Problem(where, f"none in {place}", rule, fix)


def anew_problems(plans: Iterable[StagePlan]) -> Iterator[Problem]:
    """Yield the stages that shall start anew where another start has left its work: two lives in
    one folder would pass the older one's checkpoints off as the newer one's."""
    for plan in plans:
        if plan.resume:
            continue
        try:
            left = [(folder.name, plan.checkpoints) for folder in committed(plan.checkpoints)]
        except OSError as error:
            rule, fix = "a store that can be reached", "check the address and your credentials"
            yield Problem("trainer.checkpoint_to", str(error), rule, fix)
            continue
        record = plan.directory / METRICS
        if not left and record.is_file() and record.stat().st_size:
            left = [(METRICS, plan.directory)]
        if left:
            name, where = left[-1]
            rule = f"nothing of an earlier start of stage {plan.stage} there"
            inside = isinstance(where, Path) and where.is_relative_to(plan.directory)
            away = f"move {plan.directory} away" if inside else "another trainer.checkpoint_to"
            fix = f"name=<new run>, or {away}, or resume=true to go on from there"
            yield Problem("resume", f"false, and {name} in {where}", rule, fix)


def untrained(config: RunConfig, last: str) -> str:
    """Return the stages to train for `last` to be there, "2" or "1-2": it, and those before it that
    have no checkpoint either and hand theirs on."""
    names = ordered(config.recipe)
    first = end = names.index(last)
    while (
        first > 0
        and config.recipe.stages[names[first]].inherit == PREVIOUS
        and not committed(checkpoints_of(config, names[first - 1]))
    ):
        first -= 1
    low, high = (config.recipe.stages[names[place]].index for place in (first, end))
    return str(low) if low == high else f"{low}-{high}"


def store_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield a store to save to that this installation cannot open; keys relative to the stage."""
    given = plan.config.trainer.checkpoint_to
    if given is None or "://" not in given:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(given.partition("://")[0])
    except (ImportError, ValueError) as error:
        rule = "a store that fsspec knows and whose library is installed"
        fix = f"{AT}trainer.checkpoint_to=s3://bucket/prefix with pip install 'wm-train[s3]'"
        yield Problem("trainer.checkpoint_to", f"{given} ({error})", rule, fix)
