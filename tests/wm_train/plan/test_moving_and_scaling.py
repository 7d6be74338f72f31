"""Rehearsals moved to other meshes by factors, proposals, and a recipe over numbers of devices."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from wm_train.backends.hardware import hardware
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.compare import measured, memory_line
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.scaling.advice import advice_lines, replica_lines
from wm_train.plan.scaling.picture import draw, end_of, round_numbers
from wm_train.plan.scaling.points import Assumptions, StagePoint, point_of, table
from wm_train.plan.search.candidates import Candidate, Shape
from wm_train.plan.search.moving import on_shards
from wm_train.plan.search.ranking import RUNTIME, Bases, Ranked
from wm_train.plan.search.turns import TurnBases
from wm_train.plan.speed.collectives import Call
from wm_train.plan.speed.step import StepTime
from wm_train.plan.tracing import Work

DEVICE = hardware("h100")
ONE = Shape(1, 1, "block")


def rehearsed(shards, unit=1 << 20, units=40):
    """A rank that gathers 40 units of a MiB in both passes and reduces them once."""
    part = unit // shards
    gather = [Call(p, "gather", "gather", part * (shards - 1), shards, 1) for p in PASSES]
    reduce = Call("backward", "reduce", "reduce", part * (shards - 1), shards, 1)
    state = 12 * units * part
    at_peak = {"weights": state // 3, "optimizer": 2 * state // 3, "activations": 1 << 30}
    work = {(phase, "aten.mm.default"): Work(units, 1 << 28, 1 << 42, 1 << 28) for phase in PASSES}
    calls = dict.fromkeys((*gather, reduce), units)
    held = state
    return Rehearsal(sum(at_peak.values()), at_peak, held, held + 2 * 4 * units * part, work, calls)


PASSES = ("activations", "backward")


def test_a_mesh_moved_to_itself_stays_as_it_is():
    base = rehearsed(64)
    same = on_shards(base, 64, Candidate(ONE, 1, 64, 1, 1))
    assert same.collectives == base.collectives
    assert same.work == base.work
    assert {k: v for k, v in same.at_peak.items() if v} == base.at_peak


def test_a_mesh_moved_there_is_the_one_that_was_rehearsed_there():
    moved, real = on_shards(rehearsed(2), 2, Candidate(ONE, 1, 64, 1, 1)), rehearsed(64)
    assert moved.collectives == real.collectives
    assert moved.held == pytest.approx(real.held)
    assert moved.peak == pytest.approx(real.peak)


def test_replicas_reduce_their_shards_and_parts_repeat_all():
    base = rehearsed(64)
    moved = on_shards(base, 64, Candidate(ONE, 4, 16, 2, 3))
    over = [call for call in moved.collectives if call.pattern == "all_reduce"]
    assert over == [Call("backward", "reduce", "all_reduce", 2 * (1 << 20) // 16 * 3 // 4, 4, 16)]
    assert moved.collectives[over[0]] == 80
    assert moved.work["backward", "aten.mm.default"].flops == 6 << 42
    assert moved.at_peak["weights"] == 4 * base.at_peak["weights"]
    assert moved.at_peak["activations"] == 3 << 30


def plan_of(workers, batch):
    stage = "recipe.stages.short.global_batch"
    words = ["experiment=demo", "recipe=demo", "stage=1", "data.path=x", f"{stage}={batch}"]
    words += [f"launcher.workers={workers}", "parallel.precision=bf16"]
    return plan_stages(compose(words))[0]


def test_replicas_are_proposed_where_flat_sharding_waits_for_latency():
    (line,) = replica_lines(plan_of(1024, 1024), {"student": rehearsed(1024)}, DEVICE)
    assert "parallel.dp_replicate=" in line
    assert "1,024 ranks wait for latency" in line
    assert replica_lines(plan_of(8, 8), {"student": rehearsed(8)}, DEVICE) == []


def test_activations_that_wait_on_the_host_take_none_of_the_device():
    """A mesh of a single network, of turns, and replicas; bytes in the optimizer's step stay."""
    plan, made = plan_of(8, 8), rehearsed(2)
    parallel = replace(plan.config.parallel, offload_activations=True)
    away = replace(plan, config=replace(plan.config, parallel=parallel))
    mesh, found = Candidate(ONE, 1, 8, 1, 1), []
    for one in (plan, away):
        alone = Bases(one, Frame(24, 4, 4, 8), lambda plans: [made] * len(plans), DEVICE)
        turns = TurnBases(one, Frame(24, 4, 4, 8), lambda plans, _: [made] * len(plans), DEVICE)
        found += [[own.ranked(mesh, True).memory for own in (alone, turns)]]
    moved = on_shards(made, 2, mesh)
    assert found == [[moved.peak] * 2, [moved.update] * 2]
    assert moved.peak == moved.update + 2**30 - (moved.update - moved.held)
    small = replace(DEVICE, memory=RUNTIME + 2**29)
    base = {"student": rehearsed(1024)}
    few, many = (replace(one, launcher=plan_of(1024, 1024).launcher) for one in (plan, away))
    assert replica_lines(few, base, small) == []
    assert len(replica_lines(many, base, small)) == 1


def test_a_save_is_proposed_more_often_on_more_nodes():
    steps = []
    for workers in (8, 4096):
        plan, made = plan_of(workers, workers), {"student": rehearsed(workers)}
        short = advice_lines(plan, made, DEVICE, parameters=10**6)[-1]
        assert ("save at its end alone" in short) == (workers == 8)
        plan = replace(plan, config=replace(plan.config, steps=10**9))
        line = advice_lines(plan, made, DEVICE, parameters=10**6)[-1]
        assert "trainer.checkpoint_every=" in line
        steps.append(int(line.split("save every ")[1].split(" steps")[0].replace(",", "")))
    assert steps[1] < steps[0] / 10


def points(counts=(8, 512, 10_000)):
    found = []
    for devices in counts:
        time = StepTime(400 / devices, 300 / devices, 0.0, 0.0, 0.0, 0.4)
        ranked = Ranked(Candidate(ONE, 1, devices, 1, 1), time, 10**10, rehearsed=False)
        stages = [StagePoint(name, ranked, devices, 100_000) for name in ("short", "long")]
        found.append(point_of(stages, devices, DEVICE, Assumptions(), 2 * 10**9))
    return found


def test_failures_take_a_larger_share_of_more_devices():
    few, some, many = points()
    assert few.share > some.share > many.share > 0.9
    for one in (few, some, many):
        assert one.low < one.share < one.high
        assert one.days == pytest.approx(sum(stage.days for stage in one.stages) / one.share)
    assert many.spares > some.spares
    assert many.interval_s < some.interval_s < few.interval_s
    assert few.cost == pytest.approx((8 + 8 * few.spares) * few.days * 24 * 2.5)
    assert len(table([few, some, many])) == 1 + 3 * 3


@pytest.mark.parametrize(
    ("least", "most", "marks"),
    [
        (14428, 28061, [10_000, 20_000, 50_000]),
        (0.15, 48, [0.1, 1, 10, 100]),
        (1, 1, [1, 2]),
        (0.023, 0.023, [0.02, 0.05]),
        (1, 100, [1, 2, 5, 10, 20, 50, 100]),
    ],
)
def test_marks_of_a_logarithmic_axis_are_round_and_hold_its_numbers(least, most, marks):
    assert round_numbers(least, most) == pytest.approx(marks)


def test_the_picture_is_written_with_its_assumptions(tmp_path):
    from PIL import Image

    path = tmp_path / "scaling.png"
    draw(points(), "a recipe", Assumptions().lines(), path)
    with Image.open(path) as picture:
        assert picture.size[0] > 900
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5
    assert end_of(datetime.date(2026, 1, 30), 2.5) == "2026-02-02"
    assert end_of(datetime.date(2026, 1, 30), 1e9) == "beyond the calendar"


def test_measured_steps_are_those_of_each_role_without_the_first():
    plan = plan_of(2, 2)
    rows = [{"step": 1, "step_s": 9.0, "memory_peak_bytes": 1.0}]
    rows += [{"step": n, "step_s": 0.1 * n, "data_wait_s": 0.5} for n in (2, 3, 4, 5)]
    rows += [{"step": 6, "step_s": 99.0, "skipped": 1.0}, {"step": 6, "validation_loss": 1.0}]
    found = measured(plan, rows)
    assert (found.steps, found.peak, found.data_wait) == (5, None, 0.5)
    assert found.seconds == pytest.approx({"student": 0.4})
    turns = replace(plan, config=replace(plan.config, turns="CS"))
    assert measured(turns, rows).seconds == pytest.approx({"critic": 0.4, "student": 0.4})
    assert "(-50.0%)" in memory_line(2**30, 2.0 * 2**30, "cuda")
