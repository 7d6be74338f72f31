"""Passes of a rollout that run once and are counted again: the same operators, bytes, collectives
and peak as when each of them runs."""

from __future__ import annotations

import time

import pytest
import torch

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.frame import Frame
from wm_train.plan.rehearsal import rehearse
from wm_train.plan.tracing import Tracer

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
# tensors that stand for what a pass returned; views, some of which FSDP2 makes in a first pass only
FREE = {"empty_like", "empty", "as_strided", "view", "detach"}


def turns(stage, frames, *words):
    name = {7: "distill_short", 8: "distill"}[stage]
    own = [f"recipe.stages.{name}.frames={frames}", f"stage={stage}", "data.path=x", *words]
    return plan_stages(compose(["experiment=demo", "recipe=sana_wm", *SMALL, *own]))[0]


def work_of(made):
    return {
        key: (work.calls, work.returned, work.read, work.flops)
        for key, work in made.work.items()
        if key[1].split(".")[1] not in FREE
    }


@pytest.mark.parametrize(
    ("stage", "role", "words"),
    [
        (7, "critic", ["launcher.workers=2"]),
        pytest.param(8, "student", ["launcher.workers=2"], marks=pytest.mark.full),
        pytest.param(7, "student", ["launcher.workers=2"], marks=pytest.mark.full),
        pytest.param(8, "student", ["launcher.workers=2", "parallel.cp=2"], marks=pytest.mark.full),
        pytest.param(8, "critic", ["launcher.workers=2", "parallel.cp=2"], marks=pytest.mark.full),
    ],
)
def test_a_turn_with_repeats_is_the_turn_in_full(stage, role, words):
    plan = turns(stage, 161 if stage == 8 else 89, *words)
    found, seconds = [], []
    for once in (False, True):
        started = time.process_time()
        found.append(rehearse(plan, FRAME, role=role, once=once))
        seconds.append(time.process_time() - started)
    whole, short = found
    assert work_of(short) == work_of(whole)
    assert short.collectives == whole.collectives
    assert sum(short.at_peak.values()) == pytest.approx(sum(whole.at_peak.values()), rel=0.01)
    assert short.held == whole.held
    print(f"{seconds[0]:.1f} s, with repeats {seconds[1]:.1f} s")


@pytest.mark.full
@pytest.mark.parametrize(
    ("role", "words"),
    [("student", ["launcher.workers=2"]), ("critic", ["launcher.workers=2", "parallel.cp=2"])],
)
def test_a_turn_with_rings_holds_the_same_and_moves_as_much(role, words):
    """Waypoint's rings keep every second frame, which the shapes of a past do not tell: of the
    zeros that a ring begins with, some are counted as copies."""
    lines = ["experiment=demo", "recipe=waypoint", "stage=3", "data.path=x", *words]
    plan = plan_stages(compose(lines))[0]
    frame = Frame(channels=24, height=8, width=8, temporal_stride=4)
    whole, short = (rehearse(plan, frame, role=role, once=once) for once in (False, True))
    assert (short.at_peak, short.held) == (whole.at_peak, whole.held)
    assert short.collectives == whole.collectives
    for number in ("flops", "read", "returned"):
        found, wanted = (
            sum(getattr(w, number) for w in one.work.values()) for one in (short, whole)
        )
        assert found == pytest.approx(wanted, rel=0.01), number


def test_what_was_noted_is_counted_again():
    with (tracer := Tracer()):
        x = torch.ones(100)
        with tracer.noting() as seen:
            y = x + 1 + 2
            del y
        calls = {name: work.calls for (_, name), work in tracer.work.items()}
        tracer.peak = tracer.now
        tracer.repeat(seen)
    assert seen.extra == {"build": 800}  # two results at once
    assert tracer.peak == 400 + 800
    assert tracer.now == 400
    again = {name: work.calls for (_, name), work in tracer.work.items()}
    assert again["aten.add.Tensor"] == 2 * calls["aten.add.Tensor"] == 4
    assert again["aten.ones.default"] == 1


def test_a_peak_before_what_is_noted_stays():
    with (tracer := Tracer()):
        big = torch.ones(1000)
        del big
        with tracer.noting() as seen:
            small = torch.ones(10)
        assert (tracer.peak, seen.extra) == (4000, {"build": 40})
        del small
