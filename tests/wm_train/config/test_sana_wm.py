"""The student of SANA-WM's recipe: sources, levels and sizes of stages 6 to 8."""

from __future__ import annotations

import pytest

from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage

# of a shift of 9.8; the demo's, whose clips have 770 tokens, of 3
LEVELS = {"sana_wm": (1.0, 0.967, 0.908, 0.764), "demo": (1.0, 0.9, 0.75, 0.5)}


@pytest.fixture(scope="module", params=["sana_wm", "demo"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    names = (f"experiment={request.param}", "recipe=sana_wm", f"out={folder}")
    return request.param, compose([*names, f"data.path={folder}", "stage=6-8"])


def test_stages_six_to_eight_hand_on_student_and_critic(run):
    name, config = run
    plans = {stage: plan_stage(config, stage) for stage in ("ode", "distill_short", "distill")}
    assert [plan.config.index for plan in plans.values()] == [6, 7, 8]
    sources = [plan.source.stage for plan in plans.values()]
    assert sources == ["chunk_causal", "ode", "distill_short"]
    for stage in ("distill_short", "distill"):
        plan = plans[stage]
        assert plan.role_sources["teacher"].stage == "sft"
        assert not plan.config.roles["teacher"].model.needs().causal
        assert plan.config.roles["teacher"].model == config.recipe.stages["sft"].model
        assert plan.config.roles["critic"].model == config.recipe.stages["sft"].model
        assert plan.config.distill.levels == plan.config.sampler.levels == LEVELS[name]
        assert plan.config.turns == "CCCCCS"
    job = plans["ode"].config.trajectories
    assert plans["ode"].teacher_source.stage == "sft"
    assert job.teacher.model == config.recipe.stages["sft"].model
    assert plans["ode"].config.objective.trajectory_levels() == LEVELS[name]
    assert plans["ode"].config.data.path.endswith("ode/trajectories")
    assert plans["ode"].made_from.path == config.data.path
    carried = plans["distill"].role_sources["critic"]
    assert (carried.stage, carried.role) == ("distill_short", "critic")
    assert plans["distill_short"].role_sources["critic"].stage == "sft"


def test_only_the_data_are_missing(run):
    """Everything else that `launch` judges is sound."""
    name, config = run
    wrong = {problem.where for problem in problems_of(config)}
    assert all(where == "data.path" or where.endswith(".inherit") for where in wrong), wrong
    stages = config.recipe.stages
    frames = [stages[stage].frames for stage in ("distill_short", "distill")]
    assert frames == ([337, 961] if name == "sana_wm" else [41, 81])
    guidance = stages["distill"].distill.guidance
    assert guidance == ({"negative_text": 4.0} if name == "sana_wm" else {})
    assert stages["ode"].trajectories.guidance == guidance


def test_the_student_trains_on_eight_of_the_64_devices(run):
    name, config = run
    plans = [plan_stage(config, stage) for stage in config.recipe.stages]
    workers = [plan.launcher.workers for plan in plans]
    assert workers == ([64] * 5 + [8] * 3 if name == "sana_wm" else [2] * 8)
    meshes = [plan.config.parallel.cp for plan in plans[5:]]
    assert meshes == ([1, 4, 4] if name == "sana_wm" else [1, None, None])
