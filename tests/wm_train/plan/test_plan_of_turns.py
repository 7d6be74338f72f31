"""The plan of a stage with several networks: their states add up, and each turn has one network's
gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wm_train.config.compose import compose
from wm_train.plan.memory import ClipShape, stage_memory
from wm_train.plan.turns import turn_memory

SHAPE = ClipShape(1, 11, 24, 4, 4, 8)


@pytest.fixture(scope="module")
def stage():
    small = ["model.depth=2", "model.width=32", "model.heads=2", "model.softmax_every=2"]
    run = compose(["experiment=demo", "recipe=sana_wm", *small])
    return run.recipe.stages["distill_short"]


def test_states_add_up_and_gradients_are_those_of_the_turn(stage):
    turns = turn_memory(stage, SHAPE, 11, 2)
    assert set(turns) == {"student", "critic"}
    student, critic = turns["student"], turns["critic"]
    one = stage_memory(replace(stage, roles={}, distill=None), SHAPE, 2)
    count = one.parameters
    for memory in turns.values():
        assert memory.parameters == 3 * count
        assert memory.trained == 2 * one.trained
        assert memory.optimizer == pytest.approx(2 * one.optimizer)
        assert memory.weights == 2 * one.weights + 4 * count // 2  # fp32, as the demo computes
        assert memory.gradients == one.gradients
    assert critic.activations > student.activations


def test_a_students_turn_does_not_grow_with_the_clip(stage):
    """Its activations are those of one chunk."""
    short, long = (
        turn_memory(stage, replace(SHAPE, frames=frames), frames, 2)["student"].activations
        for frames in (11, 13)
    )
    assert short == long


def test_a_frozen_teacher_is_held_in_the_compute_type(stage):
    bf16 = replace(stage, parallel=replace(stage.parallel, precision="bf16"))
    full, half = (turn_memory(one, SHAPE, 11, 2)["student"].weights for one in (stage, bf16))
    count = stage_memory(replace(stage, roles={}, distill=None), SHAPE, 2).parameters
    assert full - half == count  # 4 - 2 bytes over two ranks


def test_a_packed_students_turn_holds_one_clip_and_the_clean_keys():
    """Keys and values of every token of the clip in every block."""
    own = ["experiment=demo", "recipe=waypoint", "data.path=x"]
    stage = compose(own).recipe.stages["distill"]
    late = replace(stage, distill=replace(stage.distill, gradient="late"))
    packed, chunk = (turn_memory(one, SHAPE, 11, 2)["student"] for one in (stage, late))
    bare = replace(stage, roles={}, distill=None)
    alone = stage_memory(bare, replace(SHAPE, clips=1), 2).activations
    keys = 8 * 2 * 64 * 11 * 4 * 4  # blocks, both, key heads x channels, frames, tokens, bytes
    assert packed.activations == alone + keys
    assert packed.activations > chunk.activations
