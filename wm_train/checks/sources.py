"""Check the sources of weights and the destination of checkpoints, as far as the store shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_shards.encoding.derived import is_complete
from data_shards.weight_files import is_release
from wm_train.checkpoint.manifest import committed
from wm_train.config.curriculum import (
    PREVIOUS,
    TOGETHER,
    Source,
    StageError,
    StagePlan,
    checkpoints_of,
    ordered,
    select,
)
from wm_train.config.problems import AT, COMMAND, Problem
from wm_train.config.schema import RunConfig
from wm_train.tracking.mlflow_record import METRICS

# of a release with two experts, high noise first: of diffusers, of the native files
EXPERT_FOLDERS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
END_BYTES = 2**20


def inherit_problems(config: RunConfig, plans: Iterable[StagePlan]) -> list[Problem]:
    """Return the networks without weights to start from: nothing is there, no earlier stage of this
    very command makes them, and the stage is not to be resumed. Those that do not train are in no
    checkpoint, so they need their source then, too."""
    problems: list[Problem] = []
    order = ordered(config.recipe)
    # also those that pools train, or train together, before this run's next
    try:
        asked = select(config.recipe, config.stage)
    except StageError:  # reported where stages are selected
        asked = order
    for plan in plans:
        planned = [name for name in asked if order.index(name) < order.index(plan.stage)]
        where = f"recipe.stages.{plan.stage}."
        rows = [(f"{where}inherit", plan.source, True)]
        if plan.config.inherit_optimizer and plan.source and plan.source.others:
            key, got = f"{where}inherit_optimizer", "true between pools=each and pools=together"
            rule = "false, as only weights are handed on there"
            problems.append(Problem(key, got, rule, f"{key}=false"))
        for role, source in plan.role_sources.items():
            saved = plan.config.roles[role].optimizer is not None
            rows.append((f"{where}roles.{role}.inherit", source, saved))
        made = plan.config.trajectories and is_complete(plan.config.data.path)
        if plan.teacher_source and not made:
            rows.append((f"{where}trajectories.teacher.inherit", plan.teacher_source, False))
        for key, source, saved in rows:
            if source is not None and source.stage == plan.stage:
                rule = "another stage, as this one has no weights before it trains"
                fix = f"{key}=<an earlier stage, or a folder of checkpoints>"
                problems.append(Problem(key, plan.stage, rule, fix))
            elif source is not None and source.stage not in planned:
                problems += _source_problems(config, plan, key, source, saved)
    return problems


def _source_problems(
    config: RunConfig, plan: StagePlan, where: str, source: Source, saved: bool
) -> Iterator[Problem]:
    place = source.checkpoints
    try:
        resumed = saved and plan.resume and committed(plan.checkpoints)
        empty = [part.checkpoints for part in source.parts if not committed(part.checkpoints)]
        if resumed or not empty or (isinstance(place, Path) and is_release(place)):
            return
        place = empty[0]
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


def expert_problems(config: RunConfig, plan: StagePlan) -> Iterator[Problem]:
    """Yield a released folder of the other expert, and two released experts that are the same: the
    first of a pair is that of high noise levels (Wan2.2). Where all pools are one network, no
    released folder holds it."""
    if config.pools and plan.config.pools == TOGETHER:
        sources = {"inherit": plan.source}
        sources |= {f"roles.{role}.inherit": own for role, own in plan.role_sources.items()}
        for name, source in sources.items():
            place = source.checkpoints if source and not source.stage else None
            if isinstance(place, Path) and is_release(place):
                key = f"recipe.stages.{plan.stage}.{name}"
                rule = "a stage with pools=each, whose pools start from their own released folders"
                yield Problem(key, str(place), rule, f"{key}=<that stage>")
    inherit, pool = plan.config.inherit, config.pools.get(config.pool or "")
    folder = Path(inherit or "")
    pair = next((names for names in EXPERT_FOLDERS if folder.name in names), None)
    if pool is None or pair is None or not is_release(folder):
        return
    own, other = pair[(pool.sigma_max or 1.0) < 1.0], pair[(pool.sigma_max or 1.0) == 1.0]
    where = f"recipe.stages.{plan.stage}.inherit"
    if folder.name != own:
        rule = f"{own}, which holds the expert of this pool's noise levels"
        yield Problem(where, str(folder), rule, f"{where}={folder.parent / own}")
    elif is_release(folder.parent / other) and same_files(folder, folder.parent / other):
        rule = f"other weights than those of {folder.parent / other}, of the other expert"
        yield Problem(where, f"{folder}, which has the same", rule, "download it again")


def same_files(one: Path, other: Path) -> bool:
    """Return whether two folders hold weights of the same sizes and the same last megabytes."""

    def ends(folder: Path) -> list[tuple[str, int, bytes]]:
        found = []
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - END_BYTES))
                found.append((path.name, size, file.read()))
        return found

    return ends(one) == ends(other)


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
