"""Rows of other packages that clash, lead nowhere, or do not fit: one report each."""

from __future__ import annotations

import pytest

from wm_train.checks.values import problems_of
from wm_train.config import registry
from wm_train.config.compose import compose
from wm_train.config.problems import ConfigError, Problem

PLAY = "recipe.stages.play."


@pytest.fixture
def found(installed, clips):
    """found(*overrides) -> the problems of the laboratory's run, by key."""

    def find(*overrides: str) -> dict[str, Problem]:
        given = ["experiment=lab", f"data.path={clips}", *overrides]
        try:
            problems = problems_of(compose(given, installed / "lab" / "configs"))
        except ConfigError as error:
            problems = list(error.problems)
        assert len({problem.where for problem in problems}) == len(problems), "each once"
        return {problem.where: problem for problem in problems}

    return find


def test_a_name_of_ours_stays_ours(installed):
    assert registry.config_class("models", "sana_wm").__module__.startswith("wm_train.")
    assert registry.names("models").count("sana_wm") == 1


def test_a_name_that_two_packages_add_is_refused(found):
    (problem,) = found(PLAY + "optimizer.name=lab_twice").values()
    assert problem.where == PLAY + "optimizer.name"
    assert "lab.config:LionConfig and others.optim:Config" in problem.got
    assert "wm_train.optimizers" in problem.fix


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lab_lost", "lab.nowhere:Config, which cannot be imported"),
        ("lab_hollow", "lab.nowhere:Model is not there"),
        ("lab_function", "lab.lion:build is no configuration of wm_train.models"),
    ],
)
def test_a_row_that_leads_nowhere_is_one_problem(found, name, words):
    (problem,) = found(f"model.name={name}").values()
    assert problem.where == "model.name"
    assert words in problem.got
    assert "wm_train.models" in problem.fix


def test_unknown_keys_name_the_section(found):
    problems = found("model.layres=3", "model.softmax_every=2", PLAY + "optimizer.betas=[0.9,0.9]")
    assert {where: problem.fix for where, problem in problems.items()} == {
        "model.layres": "did you mean model.layers?",
        "model.softmax_every": "leave it out; it is a key of sana_wm (model.name=sana_wm)",
        PLAY + "optimizer.betas": "leave it out; it is a key of adamw "
        f"({PLAY}optimizer.name=adamw)",
    }


@pytest.mark.parametrize(
    ("overrides", "where", "fix"),
    [
        (["model.cell=4"], "model.cell", "model.cell=1, or encode with resize=<multiples of 80>"),
        (["model.buttons=2"], "model.buttons", "model.buttons=6"),
        (["model.channels=30"], "model.channels", "model.channels=4"),
        (["model.latent_channels=4"], "model.latent_channels", "model.latent_channels=3"),
        (
            [PLAY + "chunk_frames=2"],
            PLAY + "chunk_frames",
            "another model than lab_attention, or recipe.stages.play.chunk_frames=0",
        ),
        ([PLAY + "sampler.guidance={camera: 2}"], PLAY + "sampler.guidance.camera", "leave it out"),
        (["parallel.sharding=zero3"], PLAY + "optimizer.name", "parallel.sharding=fsdp"),
    ],
)
def test_rules_of_several_sections_speak_of_its_own_keys(found, overrides, where, fix):
    (problem,) = found(*overrides).values()
    assert (problem.where, problem.fix) == (where, fix)
