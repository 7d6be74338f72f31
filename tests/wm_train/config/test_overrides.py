"""Values with letters that mean something in Hydra's grammar, and the form to type."""

from __future__ import annotations

import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from wm_train.config.compose import compose
from wm_train.config.overrides import as_typed_text, kinds_of, read_overrides
from wm_train.config.problems import ConfigError, Problem

TEXTS = (
    "/a b",
    "~/demo",
    "d(1)",
    "x#y",
    "/a,b",
    "set[1]",
    "a{b",
    "it's",
    "a\\",
    "a\\'b",
    "'",
    "C:\\x y\\",
    "ü ñ/数据",
    "50%",
    "a=b",
    "s3://bucket/a b?c=d&e=[f]",
    "a: b",
    "tab\there",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_of_type_text_takes_any_text(text: str) -> None:
    """Hydra would read these as something else, or not at all."""
    lines, problems = read_overrides([f"data.path={text}"], {})
    assert not problems
    value = OverridesParser.create().parse_override(lines[0]).value()
    assert value == text


def test_the_text_arrives_in_the_configuration() -> None:
    given = ["data.path=/a,b", "recipe.stages.short.inherit=x (1)", "trainer.checkpoint_to=a #1"]
    config = compose(["experiment=demo", "recipe=demo", *given, "tracker.uri='null'"])
    stage = config.recipe.stages["short"]
    assert (config.data.path, stage.inherit) == ("/a,b", "x (1)")
    assert (config.trainer.checkpoint_to, config.tracker.uri) == ("a #1", "null")


def problem(*overrides: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", "recipe=demo", "data.path=x", *overrides])
    (found,) = caught.value.problems
    return found


BETAS = "recipe.stages.short.optimizer.betas"


@pytest.mark.parametrize(
    ("override", "where", "fix"),
    [
        (f"{BETAS}=(0.9,0.95)", BETAS, f"{BETAS}=[0.9,0.95]"),
        ("data.selection=a b(", "data.selection", "'data.selection=\"a b(\"'"),
        ("no value at all", "'no value at all'", "see --help"),
    ],
)
def test_other_values_are_shown_in_the_form_to_type(override: str, where: str, fix: str) -> None:
    _, (found,) = read_overrides([override], {})
    assert (found.where, found.fix) == (where, fix)


@pytest.mark.parametrize("text", ["1e5", "[a]", "{a: b}", "null", '"1"', "true", "5\\"])
def test_the_form_to_type_works(text: str) -> None:
    """The fix quotes what was typed, not what Hydra has made of it."""
    found = as_typed_text(Problem("out", "1", "text"), ["seed=1", f"out={text}"])
    (typed,) = shlex.split(found.fix)
    value = OverridesParser.create().parse_override(typed).value()
    assert value == text.strip('"')
    assert as_typed_text(Problem("out", "1", "a number", "keep"), ["out=1"]).fix == "keep"


def test_a_number_for_a_name_is_quoted_as_it_was_typed() -> None:
    found = problem("name=1e5")
    assert (found.where, found.fix) == ("name", "'name=\"1e5\"'")


def test_which_keys_take_text_is_read_from_the_sections() -> None:
    assert kinds_of("model.depth")
    assert not kinds_of("model.no_such_key")
    assert not kinds_of("seed.below")
    assert kinds_of("recipe.stages.any.data.path") == [str]


def test_a_deleted_working_directory_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    found = problem()
    assert found.where == "working directory"
    assert "deleted" in found.got
