"""A stage changes any key of its model, data, parallel and trainer, and no other stage's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from wm_train.config.compose import compose
from wm_train.config.problems import ConfigError, Problem

DEMO = ("experiment=demo", "recipe=demo")
LONG = "recipe.stages.long."
Find = Callable[..., dict[str, Problem]]

# key of stage long -> a value unlike the demo's, and one that is wrong
KEYS: dict[str, tuple[Any, Any]] = {
    "model.depth": (2, 0),
    "model.camera": (False, "maybe"),
    "model.activation_checkpointing": ("block", "blocks"),
    "trainer.accumulate": (2, 0),
    "data.prefetch": (3, 0),
    "parallel.cp": (2, 0),
}


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("key", KEYS)
def test_a_stages_own_key_changes_that_stage_only(key: str) -> None:
    value, plain = KEYS[key][0], compose([*DEMO])
    own = compose([*DEMO, f"{LONG}{key}={text(value)}"])
    assert read(own.recipe.stages["long"], key) == value
    assert read(own, key) == read(plain, key) != value
    assert own.recipe.stages["short"] == plain.recipe.stages["short"]
    section, name = key.split(".")
    was, now = (vars(getattr(c.recipe.stages["long"], section)) for c in (plain, own))
    assert {other for other in was if was[other] != now[other]} == {name}, "its other keys stay"


@pytest.mark.parametrize("key", KEYS)
def test_the_runs_key_changes_every_stage_but_one_that_has_its_own(key: str) -> None:
    value, plain = KEYS[key][0], compose([*DEMO])
    kept = read(plain, key)
    back = "null" if kept is None else text(kept)
    run = compose([*DEMO, f"{key}={text(value)}", f"{LONG}{key}={back}"])
    assert read(run, key) == read(run.recipe.stages["short"], key) == value
    assert read(run.recipe.stages["long"], key) == kept


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_one_names_the_stages_key_once(found: Find, key: str) -> None:
    assert list(found({LONG + key: KEYS[key][1]})) == [LONG + key]


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_one_of_the_run_is_not_repeated_for_its_stages(found: Find, key: str) -> None:
    assert list(found({key: KEYS[key][1]})) == [key]


def test_an_unknown_one_names_the_stages_key_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*DEMO, LONG + "model.dept=2"])
    assert [(p.where, p.fix) for p in caught.value.problems] == [
        (LONG + "model.dept", f"did you mean {LONG}model.depth?")
    ]
