"""From overrides to dataclasses: types, unknown keys, and the promise that nothing but one report
ever comes out of a mistake."""

from __future__ import annotations

import random

import pytest

from wm_train.checks.values import problems_of
from wm_train.config.compose import compose, groups
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import RunConfig
from wm_train.config.typed import from_json, to_json


def wheres(*overrides: str) -> dict[str, str]:
    """Key -> `got` of every problem that composing reports."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return {problem.where: problem.got for problem in caught.value.problems}


def fixes(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return [problem.fix for problem in caught.value.problems]


def test_demo_has_two_stages_and_two_workers() -> None:
    config = compose(["experiment=demo", "recipe=demo", "stage=2"])
    assert [
        (stage.index, stage.frames, stage.inherit) for stage in config.recipe.stages.values()
    ] == [(1, 41, None), (2, 81, "previous")]
    assert (config.name, config.stage, config.launcher.name, config.launcher.workers) == (
        "demo",
        "2",
        "ray",
        2,
    )


def test_values_and_nested_stage_keys_are_overridden() -> None:
    config = compose(
        [
            "experiment=demo",
            "recipe=demo",
            "recipe.stages.long.optimizer.betas=[0.8,0.9]",
            "model.ffn_ratio=2",
            "tracker.uri=http://x/y",
        ]
    )
    assert config.recipe.stages["long"].optimizer.betas == (0.8, 0.9)
    assert config.recipe.stages["long"].optimizer.schedule == "cosine"
    assert config.recipe.stages["short"].optimizer.betas == (0.9, 0.95)
    assert config.model.ffn_ratio == 2.0
    assert isinstance(config.model.ffn_ratio, float)
    assert config.tracker.uri == "http://x/y"


def test_json_round_trip_keeps_nulls_and_tuples() -> None:
    config = compose(["experiment=demo", "recipe=demo"])
    assert from_json(to_json(config)) == config
    assert '"dp_shard": null' in to_json(config)


def test_resolved_config_that_is_damaged_is_reported() -> None:
    with pytest.raises(ConfigError, match="no JSON"):
        from_json("{")
    with pytest.raises(ConfigError, match=r"model\.colour: got an unknown key"):
        from_json(
            to_json(compose(["experiment=demo", "recipe=demo"])).replace(
                '"depth": 4', '"depth": 4, "colour": 1'
            )
        )


def test_all_unknown_keys_and_wrong_types_are_reported_together() -> None:
    found = wheres(
        "experiment=demo",
        "recipe=demo",
        "model.dept=3",
        "seed=1.5",
        "recipe.stages.short.lr=1",
        "resume=2",
        "launcher.workers=true",
        "name=12",
    )
    assert set(found) == {
        "model.dept",
        "seed",
        "recipe.stages.short.lr",
        "resume",
        "launcher.workers",
        "name",
    }


def test_near_misses_are_suggested() -> None:
    assert fixes("experiment=demo", "recipe=demo", "model.dept=3") == ["did you mean model.depth?"]
    assert fixes("experiment=demmo") == ["experiment=demo"]
    assert fixes("data=/some/folder") == ["data.path=/some/folder"]
    assert fixes("experiment=demo", "recipe=demo", "seed=1e3") == ["seed=1000"]


def test_missing_data_path_is_a_problem() -> None:
    assert wheres("recipe=demo") == {"data.path": "nothing"}


SHORT = "recipe.stages.short.objective"


@pytest.mark.parametrize(
    "other", [f"{SHORT}.name=distribution_matching", f"{SHORT}={{name:distribution_matching}}"]
)
def test_a_part_that_is_replaced_by_name_takes_its_own_keys_along(other: str) -> None:
    """The demo's recipe gives its objective a flow_shift, which the other one does not have; a key
    of the command's own is judged, and one that both have stays."""
    demo = ["experiment=demo", "recipe=demo", "data.path=x"]
    assert compose([*demo, other]).recipe.stages["short"].objective.name == "distribution_matching"
    with pytest.raises(ConfigError, match="flow_shift"):
        compose([*demo, other, f"{SHORT}.flow_shift=2"])
    kept = compose([*demo, f"{SHORT}.name=chunk_mixture"]).recipe.stages["short"].objective
    assert (kept.name, kept.flow_shift) == ("chunk_mixture", 3.0)


@pytest.mark.parametrize(
    "override",
    [
        "+model._target_=os.system",
        "+x._target_=os.system",
        "++recipe.stages.short._target_=builtins.eval",
        "data._target_=x",
    ],
)
def test_target_is_an_unknown_key(override: str) -> None:
    assert any(
        "_target_" in where or where == "x"
        for where in wheres("experiment=demo", "recipe=demo", override)
    )


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "a${oc.env:PATH}b", "${oc.decode:1}", "${now:%Y}", "${hydra:runtime.cwd}"],
)
def test_resolvers_are_refused_and_not_resolved(value: str) -> None:
    found = wheres("experiment=demo", "recipe=demo", f"'tracker.experiment={value}'".strip("'"))
    assert list(found) == ["tracker.experiment"]
    assert value in found["tracker.experiment"]


def test_a_reference_to_another_key_is_resolved() -> None:
    assert (
        compose(["experiment=demo", "recipe=demo", "tracker.experiment=${name}"]).tracker.experiment
        == "demo"
    )
    assert "tracker.experiment" in wheres(
        "experiment=demo", "recipe=demo", "tracker.experiment=${nowhere}"
    )


OVERRIDES = [
    "hydra.run.dir=/x",
    "hydra/launcher=basic",
    "+hydra.searchpath=[/x]",
    "seed=1,2",
    "a",
    "=",
    "model=null",
    "~model",
    "experiment=null",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_what_hydra_would_take_but_we_do_not(override: str) -> None:
    assert len(wheres("experiment=demo", "recipe=demo", override)) == 1


def test_a_folder_of_ones_own_adds_choices(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("name: sana_wm\ndepth: 2\nwidth: 32\nheads: 2\n")
    assert compose(["experiment=demo", "recipe=demo", "model=tiny"], tmp_path).model.width == 32
    assert groups([tmp_path]) == {"model": ["tiny"]}
    assert "model" in wheres("experiment=demo", "recipe=demo", "model=tiny")


KEYS = [
    *(
        "seed",
        "name",
        "out",
        "resume",
        "stage",
        "model.depth",
        "model.heads",
        "model.width",
        "model.camera",
        "data.path",
        "data.prefetch",
    ),
    *(
        "parallel.cp",
        "parallel.dp_shard",
        "parallel.ulysses",
        "launcher.workers",
        "launcher.name",
        "tracker.uri",
        "trainer.samples",
    ),
    *(
        "recipe.stages",
        "recipe.stages.short",
        "recipe.stages.short.steps",
        "recipe.stages.short.optimizer.lr",
        "recipe.stages.new.index",
    ),
    *(
        "recipe.stages.long.optimizer.betas",
        "recipe.stages.long.inherit",
        "model",
        "recipe",
        "launcher",
        "experiment",
        "evil._target_",
    ),
]
VALUES = [
    *(
        "1",
        "-1",
        "0",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "true",
        "null",
        "text",
        "''",
        "../../etc",
        "[0.9,0.95]",
        "[1]",
        "[]",
        "{}",
    ),
    *(
        "10" * 30,
        "${seed}",
        "${oc.env:HOME}",
        "${",
        "$x",
        "???",
        "1,2",
        "choice(1,2)",
        "demo",
        "ray",
        "a=b",
        "\\",
        "(",
        "all",
        "1-2",
        "é",
    ),
    *("[[1]]", "range(1,3)", "glob(*)", "{short: {index: 1}}", "[0.9,0.95"),
]


def attempt(overrides: list[str]) -> tuple[tuple[Problem, ...], RunConfig | None]:
    try:
        return (), compose(overrides)
    except ConfigError as error:
        return error.problems, None


@pytest.mark.parametrize(
    ("seed", "count"), [(7, 60), pytest.param(8, 2000, marks=pytest.mark.drill)]
)
def test_random_overrides_give_a_config_or_one_report(tmp_path, seed: int, count: int) -> None:
    """Never another exception, and what composes is judged by the rules without an exception
    either."""
    chance = random.Random(seed)
    composed = 0
    for _ in range(count):
        overrides = ["experiment=demo", "recipe=demo", f"data.path={tmp_path}"]
        for _ in range(chance.randint(1, 2)):
            prefix = chance.choice(["", "", "", "+", "++", "~"])
            key = chance.choice(KEYS)
            overrides.append(prefix + key + ("" if prefix == "~" else "=" + chance.choice(VALUES)))
        problems, config = attempt(overrides)
        assert all(problem.where and problem.got and problem.rule for problem in problems), (
            overrides
        )
        if config is not None:
            composed += 1
            assert problems_of(config), (
                overrides
            )  # the data folder is empty, so there is always one
        else:
            assert problems, overrides
    print(
        f"{count} random overrides: {composed} configs, all judged, and {count - composed} reports"
    )
    assert 0.08 * count < composed < 0.92 * count
