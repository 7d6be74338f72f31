"""Turns as a function of the step, and the models of roles."""

from __future__ import annotations

import json

import pytest

from wm_train.config.curriculum import plan_stage
from wm_train.config.roles import LETTERS, Turn, turn_of, turns_of
from wm_train.config.typed import build, from_json, to_json


@pytest.mark.parametrize("turns", ["S", "CCCCCS", "SCC", "CS"])
def test_turns_are_those_of_the_repeated_text(turns):
    """Compared with counting letter by letter."""
    counts = dict.fromkeys(LETTERS.values(), 0)
    for step in range(60):
        role = LETTERS[(turns * 60)[step]]
        assert turn_of(turns, step) == Turn(role, counts[role])
        counts[role] += 1
        for name, count in counts.items():
            assert turns_of(turns, name, step + 1) == count


def test_a_cycle_of_five_to_one_gives_ten_and_fifty_of_sixty_steps():
    turns = [turn_of("CCCCCS", step).role for step in range(60)]
    assert (turns.count("student"), turns.count("critic")) == (10, 50)


@pytest.fixture
def stages(demo):
    """Return the demo's plain configuration with three more stages, and their names."""
    plain = json.loads(demo)
    recipe, long = plain["recipe"]["stages"], plain["recipe"]["stages"]["long"]
    causal = {"causal": True}
    settings = {"objective": {"name": "distribution_matching"}, "distill": {"levels": [1, 0.5]}}
    critic = {"inherit": "long", "optimizer": {"lr": 1e-5}}
    recipe["long"] = {**long, "model": {"depth": 5}}
    recipe["first"] = {
        **long,
        **settings,
        "index": 3,
        "model": {"depth": 5, **causal, "window_chunks": 3},
        "roles": {"teacher": {"inherit": "previous"}, "critic": critic},
    }
    carried = {"inherit": "first", "inherit_role": "critic", "optimizer": {"lr": 1e-6}}
    recipe["second"] = {
        **recipe["first"],
        "index": 4,
        "inherit": "first",
        "roles": {"teacher": {"inherit": "long", "model": {"depth": 6}}, "critic": carried},
    }
    return plain


def test_a_role_has_the_model_of_the_stage_that_it_inherits_from(stages):
    config = build(stages)
    first, second = (config.recipe.stages[name] for name in ("first", "second"))
    assert first.model.causal
    for role in ("teacher", "critic"):
        model = first.roles[role].model
        assert (model.depth, model.causal, model.window_chunks) == (5, False, 0)
        assert model.latent_channels == config.model.latent_channels
    assert second.roles["critic"].model == first.roles["critic"].model
    assert second.roles["teacher"].model.depth == 6
    assert first.roles["teacher"].optimizer is None
    assert first.roles["critic"].optimizer.lr == 1e-5
    assert from_json(to_json(config)) == config


def test_a_roles_plan_reads_its_own_source(stages):
    config = build(stages)
    plan = plan_stage(config, "second")
    teacher, critic = plan.of_role("teacher"), plan.of_role("critic")
    assert (plan.source.stage, plan.source.role) == ("first", "student")
    assert (teacher.source.stage, teacher.source.role) == ("long", "student")
    assert (critic.source.stage, critic.source.role) == ("first", "critic")
    assert critic.config.optimizer.lr == 1e-6
    assert critic.config.model == plan.config.roles["critic"].model
    assert critic.checkpoints == plan.checkpoints


def test_the_first_stage_has_no_previous_teacher(stages):
    stages["recipe"]["stages"]["short"]["roles"] = {"teacher": {"inherit": "previous"}}
    with pytest.raises(
        ValueError, match=r"roles\.teacher\.inherit: got previous, expected null or"
    ):
        plan_stage(build(stages), "short")
