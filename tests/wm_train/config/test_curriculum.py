"""Select stages, and find the weights that each one starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import ordered, plan_stages, select
from wm_train.config.schema import RecipeConfig, StageConfig


def recipe(**indices: int) -> RecipeConfig:
    stages = {
        name.replace("_", "-"): StageConfig(index=index, frames=9, steps=1, global_batch=1)
        for name, index in indices.items()
    }
    return RecipeConfig("test", stages)


def test_order_is_by_index_not_by_position() -> None:
    assert ordered(recipe(c=30, a=10, b=20)) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("all", ("one", "two-b", "three")),
        ("1", ("one",)),
        ("two-b", ("two-b",)),
        ("2-3", ("two-b", "three")),
        ("one-two-b", ("one", "two-b")),
        ("two-b-three", ("two-b", "three")),
        ("1-three", ("one", "two-b", "three")),
        ("3-3", ("three",)),
    ],
)
def test_selection(stage: str, names: tuple[str, ...]) -> None:
    assert select(recipe(one=1, two_b=2, three=3), stage) == names


@pytest.mark.parametrize(
    "stage", ["4", "0", "", "-", "2-1", "1-", "-1", "one,two-b", "All", "1-2-3"]
)
def test_what_is_no_stage_lists_the_stages(stage: str) -> None:
    with pytest.raises(ValueError, match="1 one, 2 two-b, 3 three"):
        select(recipe(one=1, two_b=2, three=3), stage)


def test_weights_come_from_the_stage_before_or_from_a_folder() -> None:
    short, long = plan_stages(compose(["experiment=demo", "recipe=demo", "out=o", "name=n"]))
    assert (short.stage, short.source, short.checkpoints) == (
        "short",
        None,
        Path("o/n/short/checkpoints"),
    )
    assert long.source is not None
    assert (long.source.stage, long.source.checkpoints) == ("short", short.checkpoints)
    (alone,) = plan_stages(
        compose(["experiment=demo", "recipe=demo", "stage=long", "recipe.stages.long.inherit=/w"])
    )
    assert alone.source is not None
    assert (alone.source.stage, alone.source.checkpoints) == (None, Path("/w"))


def test_the_first_stage_has_nothing_to_inherit() -> None:
    with pytest.raises(ValueError, match=r"recipe\.stages\.short\.inherit: got previous"):
        plan_stages(
            compose(["experiment=demo", "recipe=demo", "recipe.stages.short.inherit=previous"])
        )
