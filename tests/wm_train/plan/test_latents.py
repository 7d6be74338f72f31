"""Sizes of --latent: what is wrong with them is said before any work, with a fix that is none of
the same mistakes."""

from __future__ import annotations

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.problems import ConfigError
from wm_train.plan.latents import Frame, latent_frames


def plans_of(*words):
    return plan_stages(compose(["experiment=demo", "recipe=demo", "data.path=x", *words]))


def problem_of(plans, *given):
    with pytest.raises(ConfigError) as raised:
        latent_frames(plans, given)
    (problem,) = raised.value.problems
    return problem


@pytest.mark.parametrize(
    ("given", "rule", "fix"),
    [
        ("24x0x40/8", "sizes of at least 1", "24x22x40/8"),
        ("24x7x10/-8", "sizes of at least 1 and the 8 raw frames", "24x7x10/8"),
        ("16x7x10/8", "the model's 24 channels", "24x7x10/8"),
        ("24x7x10/5", "the 8 raw frames of a latent that the model's camera packs", "24x7x10/8"),
        ("short=", "channels x height x width / stride", "128x22x40/8"),
    ],
)
def test_wrong_sizes_are_told_by_the_rule_that_they_break(given, rule, fix):
    problem = problem_of(plans_of("stage=1"), given)
    assert problem.rule.startswith(rule)
    assert problem.fix == f"--latent {fix}"


@pytest.mark.parametrize("key", ["camera", "plucker"])
def test_a_model_that_packs_no_camera_takes_any_stride(key):
    plans = plans_of("stage=1", f"recipe.stages.short.model.{key}=false")
    assert latent_frames(plans, ["24x7x10/5"]) == {"short": Frame(24, 7, 10, 5)}
