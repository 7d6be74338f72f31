"""Judge the data job that makes a stage's trajectories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from wm_train.checks.guidance import guidance_problems
from wm_train.checks.roles import network_problems
from wm_train.config.curriculum import StageError, StagePlan, select
from wm_train.config.problems import AT, Problem
from wm_train.config.roles import STUDENT, TEACHER
from wm_train.config.schema import RecipeConfig


def job_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield what does not go together in the data job of one stage; keys relative to the stage."""
    stage, job = plan.config, plan.config.trajectories
    if job is None:
        return
    if not stage.objective.trajectory_levels():
        rule = f"null, as objective {stage.objective.name} reads none"
        yield Problem("trajectories", "a section", rule, f"{AT}trajectories=null")
    at = "trajectories.teacher."
    yield from network_problems(stage, TEACHER, job.teacher, at)
    if job.teacher.inherit_role != STUDENT:
        rule = "student, as a critic has learned the flow of a student's clips"
        yield Problem(f"{at}inherit_role", repr(job.teacher.inherit_role), rule)
    key, model = "trajectories.guidance", job.teacher.model
    yield from guidance_problems(key, job.guidance, model, "teacher")
    data = plan.data_at_start
    rows = (
        ("data.mixture", str(list(data.mixture)), bool(data.mixture), "{}", "of one data set"),
        ("data.buckets", str(list(data.buckets)), bool(data.buckets), "[]", "of one length"),
        ("data.pack", "true", data.pack, "false", "of whole clips"),
    )
    for key, got, wrong, right, why in rows:
        if wrong:
            rule = f"{right} with trajectories, which are {why}"
            yield Problem(key, got, rule, f"{AT}{key}={right}")


def alone_problems(recipe: RecipeConfig, stage: str, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems of the data jobs of the selected stages, which do not need what the
    stages inherit."""
    found = [p for p in problems if not re.fullmatch(r"recipe\.stages\.[^.]+\.inherit", p.where)]
    with suppress(StageError):  # reported already
        for name in select(recipe, stage):
            if recipe.stages[name].trajectories is None:
                rule = "a stage that has trajectories, with --trajectories"
                found.append(Problem("stage", name, rule, "stage=ode"))
    return found
