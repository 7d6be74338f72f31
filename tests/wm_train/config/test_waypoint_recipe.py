"""Waypoint's recipe has the numbers of its paper and public code."""

from __future__ import annotations

import pytest

from wm_train.checks.roles import role_problems
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.evaluation.samples import levels_of


@pytest.fixture(scope="module")
def plan():
    return plan_stage(compose(["experiment=waypoint", "data.path=x"]), "distill")


def test_the_stage_is_sound(plan):
    assert not role_problems(plan)


def test_steps_levels_and_guidance_are_those_of_the_paper(plan):
    """§4 eq. 9 and §5.3; IDA and ISG of SenseFlow's SD 3.5 trainer."""
    stage, distill = plan.config, plan.config.distill
    assert distill.levels == stage.sampler.levels == (1.0, 0.9, 0.75, 0.3)
    assert distill.sampler == stage.sampler.step == "euler"
    assert distill.context_sigma == stage.sampler.context_sigma == 0.0
    assert distill.guidance == {"controls": 15.0, "context": 2.0}
    assert (distill.gradient, distill.ida, distill.isg) == ("packed", 0.98, 0.5)
    assert stage.chunk_frames == 1
    assert {own.model for own in stage.roles.values()} == {stage.model}


@pytest.mark.parametrize("stage", ["pretrain_360p", "pretrain_720p"])
def test_pretraining_is_sampled_as_it_is_played(stage):
    """Paper §5.2, §5.3: frame by frame, the past at 0.15, 60 steps of a shift of 3, which makes
    the student's 0.9 and 0.75 of 0.75 and 0.5."""
    config = plan_stage(compose(["experiment=waypoint", "data.path=x"]), stage).config
    levels = levels_of(config)
    assert len(levels) == 61
    assert [levels[place] for place in (0, 15, 30, 60)] == pytest.approx([1.0, 0.9, 0.75, 0.0])
    assert (config.sampler.name, config.sampler.context_sigma) == ("stream", 0.15)
    assert config.chunk_frames == 1
