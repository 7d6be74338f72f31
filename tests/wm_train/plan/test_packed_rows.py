"""Packed rows in a plan: how many go through the model at once."""

from __future__ import annotations

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.device_memory import clip_shape, micro_batches
from wm_train.plan.latents import Frame

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
DEMO = ["experiment=demo", "data.path=x", "stage=1", "launcher.workers=1", "trainer.accumulate=2"]
SHORT = ["recipe=demo", "recipe.stages.short.global_batch=4", "recipe.stages.short.frames=25"]
WAYPOINT = ["recipe=waypoint", "recipe.stages.pretrain_360p.global_batch=4"]


@pytest.mark.parametrize(
    ("words", "clips", "parts"),
    [
        (SHORT, 2, 2),
        ([*SHORT, "data.pack=true"], 1, 4),  # each row has its own layout
        ([*WAYPOINT, "data.pack=true"], 2, 2),  # a model that takes different layouts together
    ],
)
def test_packed_rows_go_one_by_one_where_they_need_one_layout(words, clips, parts):
    plan = plan_stages(compose([*DEMO, *words]))[0]
    assert micro_batches(plan) == parts
    if "recipe=demo" in words:
        assert clip_shape(plan, FRAME)[1][0] == clips
