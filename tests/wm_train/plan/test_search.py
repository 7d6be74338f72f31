"""The mesh search: equal to brute force, a reason for every mesh that fell, and accepted by the
launcher's rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wm_train.backends.hardware import hardware
from wm_train.checks.mesh import mesh_problems
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.problems import ConfigError
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import ReadsOnHost, Rehearsal, rehearse
from wm_train.plan.scaling import points
from wm_train.plan.scaling.points import STATE_BYTES, Assumptions
from wm_train.plan.search import report
from wm_train.plan.search.candidates import Candidate, Refused, Shape, batch_lines, listed, plan_on
from wm_train.plan.search.ranking import NEAR, Bases, search, usable
from wm_train.plan.search.report import device_counts, refused_lines, search_lines
from wm_train.plan.speed.collectives import Call
from wm_train.plan.speed.step import step_time
from wm_train.plan.tracing import Work

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
DEVICE = hardware("h100")


def stage_plan(batch, frames=17):
    own = [f"recipe.stages.short.{key}" for key in (f"frames={frames}", f"global_batch={batch}")]
    words = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere", *SMALL, *own]
    return plan_stages(compose([*words, "parallel.precision=bf16"]))[0]


def bases(plan):
    return Bases(plan, FRAME, lambda plans: [rehearse(one, FRAME) for one in plans], DEVICE)


def seconds_of(plan, candidate):
    """The step of a candidate, rehearsed in its own world with all its micro-batches."""
    made = rehearse(plan_on(plan, candidate), FRAME)
    blocks = plan.config.model.depth * candidate.accumulate
    return step_time(made, DEVICE, blocks, compiled=False).seconds


def compare_with_brute_force(devices, batch):
    plan = stage_plan(batch)
    true = {
        one: seconds_of(plan, one) for one in listed(plan, devices, 3) if isinstance(one, Candidate)
    }
    assert bases(plan).frames == 3
    assert true, "some mesh can train it"
    found = search(bases(plan), devices)
    best = sorted(true.values())[:5]
    mine = sorted(true[one.candidate] for one in found.best)
    assert mine == pytest.approx(best, rel=0.02)
    assert found.best[0].time.seconds == pytest.approx(true[found.best[0].candidate], rel=0.05)
    assert len(found.best) + sum(r.reason != "" for r in found.refused) >= len(true)


@pytest.mark.full
@pytest.mark.parametrize(("devices", "batch"), [(2, 2), (4, 4), (8, 4), (64, 64)])
def test_it_finds_what_rehearsals_of_all_meshes_find(devices, batch):
    compare_with_brute_force(devices, batch)


def quick(plan):
    """A rehearsal by hand: a rank computes its share, up to 8 % off the formula, gathers
    20 units, and keeps the less, the more it computes again. The first rank has the most frames."""
    own, world = plan.config.parallel, plan.launcher.workers
    kind, size = plan.config.model.activation_checkpointing, own.cp or 1
    more, kept = {"none": (1.0, 160e9), "selective": (1.1, 60e9), "block": (1.33, 20e9)}[kind]
    off = 1 + 0.02 * ((3 * (own.ring or 1) + 5 * (own.ulysses or 1)) % 9 - 4) * (size > 1)
    frames = FRAME.time(plan.config.frames).latents(plan.config.frames)
    share = -(-frames // size) / frames
    work = Work(200, 10**9, round(2e15 * more * off * share), 10**9)
    unit = 5 * 10**7
    calls = {
        Call(p, lane, lane, unit // world * (world - 1), world, 1): 20
        for p, lane in (("activations", "gather"), ("backward", "gather"), ("backward", "reduce"))
    }
    own_state = 20 * 8 * unit // world
    at_peak = {"weights": own_state, "activations": round(kept * off * share)}
    update = own_state + 2 * 20 * 2 * unit // world
    total = sum(at_peak.values())
    return Rehearsal(total, at_peak, own_state, update, {("backward", "aten.mm"): work}, calls)


def test_it_finds_what_brute_force_finds():
    """On every number of devices up to 64 no mesh that fell by formula is among the best."""
    found_some = 0
    own = Bases(stage_plan(32, frames=81), FRAME, lambda plans: [*map(quick, plans)], DEVICE)
    for devices in range(1, 65):
        every = [c for c in listed(own.plan, devices, own.frames) if isinstance(c, Candidate)]
        brute = sorted((own.ranked(c, True) for c in every), key=lambda one: one.order)
        brute = [one for one in brute if one.memory <= usable(DEVICE)]
        found = search(own, devices)
        assert found.best == brute[:5], devices
        assert len(found.best) + len(found.refused) >= len(every)
        assert all(one.reason for one in found.refused)
        found_some += len(found.best) > 1
    assert found_some > 10


def test_a_mesh_that_does_not_fit_says_by_how_much_and_a_slow_one_on_what_it_waits():
    own = Bases(stage_plan(32, frames=81), FRAME, lambda plans: [*map(quick, plans)], DEVICE)
    reasons = {one.reason.split(":")[0].split(" by ")[0] for one in search(own, 16).refused}
    assert {"DOES NOT FIT", "slower", "batch"} - reasons <= {"batch"}
    lines = refused_lines(search(own, 16).refused)
    assert any("DOES NOT FIT" in line and "of 77 GB" in line for line in lines)
    assert any("x the best" in line and "mostly it" in line for line in lines)


def test_every_mesh_is_a_candidate_or_has_a_reason_and_candidates_start():
    plan = stage_plan(12, frames=81)
    for devices in (8, 12, 156):  # 13 devices for each of 12 clips are more than 11 frames
        every = list(listed(plan, devices, 11))
        for one in every:
            if isinstance(one, Refused):
                assert one.mesh
                assert one.reason.split(":")[0] in ("batch", "frames", "rule")
            else:
                assert one.devices == devices
                assert one.clips * one.accumulate * one.dp_replicate * one.dp_shard == 12
                assert mesh_problems(plan_on(plan, one)) == []
        assert any(isinstance(one, Candidate) for one in every) == (devices != 156)


def test_frames_that_leave_no_member_without_one_are_split_over_any_number():
    """500 frames over 64 are 52 parts of eight and 12 of seven."""
    many = {one.cp for one in listed(stage_plan(8), 64, 500) if isinstance(one, Candidate)}
    assert many == {8, 16, 32, 64}
    few = [one.reason for one in listed(stage_plan(8), 64, 63) if isinstance(one, Refused)]
    assert [reason for reason in few if "frames" in reason] == [
        "frames: 63 leave some of 64 members without one"
    ]


def test_reasons_name_keys_of_the_stage_and_its_recompute_goes_with_each_checkpointing():
    plan = stage_plan(8, frames=81)
    kept = replace(plan.config.parallel, recompute="keep_attention")
    plan = replace(plan, config=replace(plan.config, parallel=kept))
    every = list(listed(plan, 8, 11))
    assert not any("{at}" in one.reason for one in every if isinstance(one, Refused))
    ways = {
        one.shape.checkpointing: one.words("short", "keep_attention")
        for one in every
        if isinstance(one, Candidate)
    }
    assert set(ways) == {"none", "selective", "block"}
    assert "recipe.stages.short.parallel.recompute=keep_attention" in ways["block"]
    assert "recipe.stages.short.parallel.recompute=answers" in ways["selective"]


def test_the_words_of_a_mesh_give_it_to_a_stage_with_values_of_its_own():
    """Check them against what the recipe says of the stage alone."""
    own = ("workers=2", "frames=81", "global_batch=8", "trainer.accumulate=2", "parallel.cp=2")
    own += ("parallel.dp_shard=1", "model.activation_checkpointing=selective")
    lines = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere", *SMALL]
    lines += ["launcher.workers=4", *(f"recipe.stages.short.{key}" for key in own)]
    (plan,) = plan_stages(compose(lines))
    every = [one for one in listed(plan, 8, 11) if isinstance(one, Candidate)]
    for one in (every[0], every[len(every) // 2], every[-1]):
        words = one.words(plan.stage, plan.config.parallel.recompute)
        (pasted,) = plan_stages(compose([*lines, *words]))
        wanted = plan_on(plan, one)
        assert pasted.config == wanted.config
        assert pasted.launcher.workers == wanted.launcher.workers == 8


@pytest.mark.parametrize("recompute", ["answers", "keep_attention", "collectives"])
def test_the_formula_knows_what_recomputation_keeps(recompute):
    wan = "{name:wan,latent_channels:24,depth:8,width:128,heads:4,ffn_width:256,patch_size:1"
    lines = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere"]
    lines.append(f"recipe.stages.short.model={wan},text_width:0,activation_checkpointing:block}}")
    lines += ["recipe.stages.short.frames=161", "recipe.stages.short.global_batch=1"]
    plan = plan_stages(compose([*lines, f"parallel.recompute={recompute}"]))[0]
    frame = replace(FRAME, height=8, width=8)
    own = Bases(plan, frame, lambda plans: [rehearse(one, frame) for one in plans], DEVICE)
    real, found = (made(Shape(2, 2, "block"))[0] for made in (own.real, own.by_formula))
    kept = real.at_peak["activations"]
    assert found.at_peak["activations"] == pytest.approx(kept, rel=NEAR - 1)


def test_a_stage_that_reads_on_the_host_is_not_searched(monkeypatch):
    def fails(_):
        raise ReadsOnHost("aten.item")

    plan = stage_plan(8)
    unknown = Bases(plan, FRAME, fails, DEVICE)
    for module in (report, points):
        monkeypatch.setattr(module, "bases_of", lambda *_: unknown)
    why = "its step reads aten.item on the host"
    assert f"  none proposed: {why}" in search_lines(plan, FRAME, DEVICE, [8])
    sizes = {"plans": [plan], "frames": {plan.stage: FRAME}, "hardware": DEVICE}
    found, left_out = points.points_of(**sizes, counts=[8], assumed=Assumptions())
    assert (found, left_out) == ([], [f"stage {plan.stage} is left out: {why}"])


def test_the_batch_is_said_first():
    plan = stage_plan(32)
    plan = replace(plan, config=replace(plan.config, parallel=replace(plan.config.parallel, cp=2)))
    lines = batch_lines(plan, 10_000)
    assert "batch 32: at cp 2 it feeds at most 64 devices" in lines[0]
    assert "cp 313 or more, or a batch of 5,000 clips at cp 2" in lines[1]
    by_parts = replace(plan.config.parallel, cp=None, ulysses=4, ring=2)
    plan = replace(plan, config=replace(plan.config, parallel=by_parts))
    assert "batch 32: at cp 8 it feeds at most 256 devices" in batch_lines(plan, 256)[0]


def test_points_count_what_a_sequence_group_feeds_and_what_a_save_writes(monkeypatch, capsys):
    """A batch grows where the recipe's feeds no more devices; a checkpoint is stored before the
    next one is due."""
    plan = stage_plan(8, frames=249)
    by_parts = replace(plan.config.parallel, cp=None, ulysses=2, ring=2)
    plan = replace(plan, config=replace(plan.config, parallel=by_parts))

    def made(plan, *_):
        return Bases(plan, FRAME, lambda plans: [quick(one) for one in plans], DEVICE)

    monkeypatch.setattr(points, "bases_of", made)
    slow = Assumptions(store_rate=1e5)
    sizes = {"plans": [plan], "frames": {plan.stage: FRAME}, "hardware": DEVICE}
    found, left_out = points.points_of(**sizes, counts=[32, 64], assumed=slow)
    assert left_out == []
    assert [one.stages[0].batch for one in found] == [8, 16]
    stored_s = STATE_BYTES * made(plan).parameters() / slow.store_rate
    assert found[0].interval_s >= stored_s > 3600
    assert "64 devices" in capsys.readouterr().err


def test_numbers_of_devices():
    assert device_counts("64") == [64]
    assert device_counts("8..100") == [8, 16, 32, 64, 100]
    for text in ("0", "9..8", "8..", "many", "1..2..3"):
        with pytest.raises(ConfigError, match="--gpus"):
            device_counts(text)
