"""Find everything that is wrong with a configuration, before Ray or torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from data_shards.schema import DatasetInfo
from wm_train.checks.data import data_problems
from wm_train.checks.launcher import launcher_problems
from wm_train.checks.mesh import mesh_problems
from wm_train.checks.paths import path_problems
from wm_train.checks.roles import role_problems, source_problems
from wm_train.checks.sources import anew_problems, expert_problems, inherit_problems, store_problems
from wm_train.checks.stages import stage_problems
from wm_train.checks.trajectories import job_problems
from wm_train.config.curriculum import (
    StageError,
    StagePlan,
    ordered,
    own_stages,
    plan_stage,
    role_sources,
    source_of,
)
from wm_train.config.problems import AT, OWN, Problem
from wm_train.config.rules import broken_rules
from wm_train.config.schema import NAME, PER_STAGE, RunConfig
from wm_train.config.typed import reported_once


def problems_of(config: RunConfig) -> list[Problem]:
    """Return everything that is wrong with `config`, each mistake once; empty if nothing is.

    First the rules beside the keys, then what sections ask of each other, the data and the disk.
    """
    values = reported_once(broken_rules(config))
    values += path_problems(config.out, config, config.recipe.stages)
    problems = [*values, *_recipe_problems(config), *launcher_problems(config)]
    plans, infos = _plans(config), dict[str, DatasetInfo | Problem]()
    for plan in plans:
        own = [*stage_problems(plan), *mesh_problems(plan), *store_problems(plan)]
        own += [*role_problems(plan), *job_problems(plan), *data_problems(plan, infos)]
        problems += [*source_problems(config.recipe.stages, plan), *expert_problems(config, plan)]
        problems += [lift_problem(config, plan.stage, problem) for problem in own]
    problems += [*inherit_problems(config, plans), *anew_problems(plans)]
    wrong = {problem.where for problem in values}
    return [p for p in dict.fromkeys(problems) if p in values or p.where not in wrong]


def _plans(config: RunConfig) -> list[StagePlan]:
    """Return the selected stages, or all of them where the selection is wrong."""
    try:
        names = own_stages(config)
    except StageError:  # already reported by _recipe_problems
        names = ordered(config.recipe)
    plans = []
    for name in names:
        with suppress(StageError):  # the same
            plans.append(plan_stage(config, name))
    return plans


def lift_problem(config: RunConfig, stage: str, problem: Problem) -> Problem:
    """Return a stage's problem, "model.heads" of stage long, under the run's key where the stage's
    section is the run's, else under recipe.stages.long; so also the keys in its cure."""
    own = config.recipe.stages[stage]
    shared = [name for name in PER_STAGE if getattr(own, name) == getattr(config, name)]
    rule, fix, prefix = problem.rule, problem.fix, f"recipe.stages.{stage}."
    fix = fix.replace(OWN, prefix)
    for section in shared:
        rule, fix = (text.replace(f"{AT}{section}.", f"{section}.") for text in (rule, fix))
    problem = replace(problem, rule=rule, fix=fix).under(prefix)
    key = problem.where.removeprefix(prefix)
    return replace(problem, where=key) if key.split(".")[0] in shared else problem


def _recipe_problems(config: RunConfig) -> list[Problem]:
    """Return problems of names, order, the selection and what is inherited within the recipe."""
    stages = config.recipe.stages
    if not stages:
        return [Problem("recipe.stages", "none", "at least one stage", "recipe=demo")]
    problems = [*_name_problems(stages), *_index_problems(config)]
    try:
        for name in own_stages(config):
            source_of(config, name)
            role_sources(config, name)
    except StageError as error:
        problems.append(error.problem)
    return problems


def _name_problems(stages: Iterable[str]) -> Iterator[Problem]:
    for name in stages:
        if not NAME.fullmatch(name) or name == "all" or name.isdigit():
            rule = "a name of letters, digits, '.', '_' and '-' that is neither a number nor all"
            yield Problem(f"recipe.stages.{name}", repr(name), rule, "rename it")


def _index_problems(config: RunConfig) -> Iterator[Problem]:
    stages = config.recipe.stages
    indices = [stage.index for stage in stages.values()]
    for name, stage in stages.items():
        where = f"recipe.stages.{name}."
        if stage.inherit == "":
            rule = "previous, a checkpoint directory or null"
            yield Problem(f"{where}inherit", "''", rule, "null")
        if stage.index < 1 or indices.count(stage.index) > 1:
            others = [n for n in stages if n != name and stages[n].index == stage.index]
            got = f"{stage.index}" + (f", as {', '.join(others)} has" if others else "")
            fix = f"{max(*indices, 0) + 1}"
            yield Problem(f"{where}index", got, "a number of its own, from 1", fix)
