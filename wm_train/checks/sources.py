"""Check the sources of weights and the destination of checkpoints, as far as the store shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from wm_train.checkpoint.manifest import committed
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import AT, Problem


def inherit_problems(plans: Iterable[StagePlan]) -> list[Problem]:
    """Return the stages without weights to start from: none exist, no earlier stage of this command
    makes them, and the stage is not to be resumed."""
    problems = []
    planned: list[str] = []
    for plan in plans:
        planned.append(plan.stage)
        if plan.source is None or plan.source.stage in planned:
            continue
        where, source = f"recipe.stages.{plan.stage}.inherit", plan.source.checkpoints
        try:
            resumed = plan.resume and committed(plan.checkpoints)
            if resumed or committed(source) or (source / "config.json").is_file():
                continue
        except OSError as error:
            rule, fix = "a store that can be reached", "check the address and your credentials"
            problems.append(Problem(where, str(error), rule, fix))
            continue
        fix = "the folder that holds step_*"
        if plan.source.stage:
            fix = f"train it first: stage={plan.source.stage}, or both: stage=all"
        rule = "a folder with checkpoints (step_*), or of a diffusers transformer (config.json)"
        problems.append(Problem(where, f"none in {source}", rule, fix))
    return problems


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
