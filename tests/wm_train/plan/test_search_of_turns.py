"""Meshes and pictures of stages whose turns train several networks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from wm_train.backends.hardware import hardware
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.scaling.picture import draw
from wm_train.plan.scaling.points import Assumptions, StagePoint, on_devices, point_of, table
from wm_train.plan.search.candidates import Candidate, Shape
from wm_train.plan.search.ranking import Ranked, search
from wm_train.plan.search.turns import FIXED, TurnBases, mean_time
from wm_train.plan.speed.step import StepTime
from wm_train.plan.tracing import Work

DEVICE, FRAME = hardware("h100"), Frame(24, 4, 4, 8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
SIZES = {"student": 3, "critic": 1}  # how much a turn costs


def turns_plan(batch=8):
    own = [f"recipe.stages.distill_short.global_batch={batch}", "parallel.precision=bf16"]
    words = ["experiment=demo", "recipe=sana_wm", "stage=7", "data.path=x", "parallel.cp=2"]
    return plan_stages(compose([*words, *SMALL, *own, "launcher.workers=2"]))[0]


def bases(plan):
    """Rehearsals by hand: the step of a role costs its size times the clips that a rank rolls out,
    of two clips on a group of two ranks one each."""
    asked = []

    def rehearse(plans, role):
        asked.append((role, [one.config.global_batch for one in plans]))
        found = []
        for one in plans:
            clips, world = one.config.global_batch, one.launcher.workers
            rolled = 1 if clips == 2 else clips
            flops = {("activations", "aten.mm"): Work(9, 10**6, SIZES[role] * rolled * 10**14)}
            held = 12 * 10**9 // world
            at_peak = {"weights": 4 * 10**9 // world, "optimizer": 8 * 10**9 // world}
            at_peak["activations"] = SIZES[role] * clips * 10**9
            peak = sum(at_peak.values())
            found.append(Rehearsal(peak, at_peak, held, held, flops, {}))
        return found

    return TurnBases(plan, FRAME, rehearse, DEVICE), asked


def test_rollouts_that_can_be_dealt_are_rehearsed_so():
    own, asked = bases(turns_plan(8))
    assert own.shape == Shape(1, 2, "none") or own.shape.ring * own.shape.ulysses == 2
    one = own.ranked(Candidate(own.shape, 1, 8, 1, 1), True)
    assert asked == [("student", [1]), ("critic", [1])]
    four = own.ranked(Candidate(own.shape, 1, 2, 1, 4), True)
    assert asked[2:] == [("student", [2]), ("critic", [2])]
    # four clips are two rollouts on each rank of the group
    assert four.time.compute == pytest.approx(2 * one.time.compute)
    three = own.ranked(Candidate(own.shape, 1, 2, 1, 3), True)
    assert three.time.compute == pytest.approx(3 * one.time.compute)  # all are made by each
    assert len(asked) == 4


def test_the_time_is_the_mean_over_a_cycle_and_memory_that_of_the_largest_turn():
    own, _ = bases(turns_plan(8))
    ranked = own.ranked(Candidate(own.shape, 1, 8, 1, 1), True)
    alone = 10**14 / DEVICE.matmul
    assert own.plan.config.turns == "CCCCCS"
    assert ranked.time.compute == pytest.approx((5 * 1 + 3) / 6 * alone, rel=1e-3)
    assert math.isnan(ranked.time.mfu)
    assert ranked.memory == pytest.approx(3e9 + 12e9 / 16, rel=1e-6)
    with pytest.raises(ZeroDivisionError):
        mean_time("CCCCCS", {})


def test_every_mesh_is_searched_on_the_configured_group_or_says_why_not():
    own, _ = bases(turns_plan(8))
    found = search(own, 8)
    assert {one.candidate.shape for one in found.best} == {own.shape}
    assert any(one.reason == FIXED for one in found.refused)
    assert all(one.reason for one in found.refused)
    assert len({one.mesh for one in found.refused if one.reason == FIXED}) == sum(
        one.reason == FIXED for one in found.refused
    )


def test_more_devices_than_the_batch_feeds_get_a_larger_batch():
    own, _ = bases(turns_plan(2))
    small, large = on_devices(own, 4), on_devices(own, 64)
    assert (small.batch, large.batch) == (2, 32)
    assert large.steps == small.steps / 16
    assert large.ranked.time.seconds == pytest.approx(small.ranked.time.seconds, rel=0.05)


@pytest.mark.parametrize(
    ("devices", "batch"), [(22, 11), (25, 5), (27, 9), (9, 6), (13, 4), (10_007, 4)]
)
def test_a_larger_batch_goes_evenly_over_groups_that_divide_the_devices(devices, batch):
    """Groups of 2 divide none but 22; no batch is smaller than the recipe's 4."""
    own, asked = bases(turns_plan(4))[0], []
    own.with_batch = lambda clips: asked.append(clips) or bases(turns_plan(clips))[0]
    on_devices(own, devices)
    assert asked == [batch]


def test_a_picture_without_an_mfu_is_drawn(tmp_path):
    from PIL import Image

    time = StepTime(1.0, 0.8, 0.1, 0.05, 0.05, float("nan"))
    ranked = Ranked(Candidate(Shape(1, 2, "block"), 1, 4, 1, 1), time, 10**10, rehearsed=True)
    plain = replace(ranked, time=replace(time, mfu=0.4))
    for stages in ([ranked], [plain, ranked]):
        found = [
            point_of(
                [StagePoint(f"s{i}", one, 4, 1e5) for i, one in enumerate(stages)],
                n,
                DEVICE,
                Assumptions(),
                10**9,
            )
            for n in (8, 64)
        ]
        assert "MFU none" in "\n".join(table(found))
        draw(found, "a recipe", [], tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.size[0] > 900
