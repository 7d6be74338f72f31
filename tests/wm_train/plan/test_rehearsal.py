"""A rehearsed step against real ones: operators, bytes, depth, traps."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import parallel.comm
from parallel.attend_cost import Cost
from parallel.process_group import ProcessGroupComm
from parallel.traffic import expected_cost
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.roles import Turn
from wm_train.models.experts.config import ExpertsConfig
from wm_train.plan import kept, rehearsal
from wm_train.plan.depth import joined, rehearse_deep, shallow, shortened
from wm_train.plan.device_memory import clip_shape, micro_batches, with_rehearsal
from wm_train.plan.latents import Frame
from wm_train.plan.memory import Memory
from wm_train.plan.rehearsal import (
    Rehearsal,
    example_batch,
    open_shapes,
    rehearse,
    trace_turn,
    world_in_name,
)
from wm_train.plan.speed.collectives import gloo_copies
from wm_train.plan.tracing import Tracer
from wm_train.training.networks import build_networks

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
LINE = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere", *SMALL]
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def plan(*words):
    return plan_stages(compose([*LINE, "recipe.stages.short.frames=25", *words]))[0]


def on_real_tensors(stage_plan):
    """The same step with storage, in the same world in name: its collectives answer at once."""
    with world_in_name(stage_plan.launcher.workers, 0) as world:
        stage, tracer = open_shapes(stage_plan, FRAME, world), Tracer(inside=gloo_copies)
        state = build_networks(stage_plan, stage.mesh.fsdp, stage.backend.device)
        with tracer, tracer.resizing():
            batch = example_batch(stage, FRAME)
            return trace_turn(stage, state, batch, Turn("student", 0), tracer)


# Views cost nothing; attention on real tensors leaves strides that want a copy more or less.
VIEWS = {"view", "_unsafe_view", "detach", "alias", "clone"}


def operators(made):
    """Calls of operators by name, phases together, without views and copies."""
    total = Counter()
    for (_, name), work in made.work.items():
        if name.split(".")[1] not in VIEWS and not name.startswith("prim."):
            total[name] += work.calls
    return total


def clones(made):
    return sum(work.calls for (_, name), work in made.work.items() if "clone" in name)


@pytest.fixture(scope="module")
def alone():
    return rehearse(plan("launcher.workers=1"), FRAME)


@pytest.mark.parametrize(
    "words",
    [
        ["launcher.workers=1"],
        ["launcher.workers=2", "parallel.cp=2", "model.activation_checkpointing=block"],
    ],
    ids=["alone", "cp2"],
)
def test_shapes_alone_take_the_operators_and_bytes_of_real_tensors(words):
    stage_plan = plan(*words)
    rehearsed, real = rehearse(stage_plan, FRAME), on_real_tensors(stage_plan)
    assert operators(rehearsed) == operators(real)
    attended = sum(n for name, n in operators(real).items() if "attention" in name)
    assert abs(clones(rehearsed) - clones(real)) <= attended
    assert rehearsed.held == pytest.approx(real.held, abs=64)  # a number more or less
    assert sum(rehearsed.at_peak.values()) == pytest.approx(sum(real.at_peak.values()), rel=0.01)


def test_a_stage_that_trains_on_trajectories_is_rehearsed():
    levels = "recipe.stages.short.objective={name:ode_regression,levels:[1.0,0.5]}"
    made = rehearse(plan("launcher.workers=1", levels), FRAME)
    assert made.peak > made.held > 0


def test_selective_checkpointing_keeps_what_needed_frames_do_not_write_to():
    """On process groups its second run takes what kernels returned in the first, unchanged."""
    mesh = ["launcher.workers=2", "parallel.cp=2", "parallel.attention_exchange=need"]
    rehearse(plan(*mesh, "model.activation_checkpointing=selective"), FRAME)


def test_collectives_of_a_sequence_group_are_those_that_verbs_promise(monkeypatch):
    """Call by call, in both directions, with a ring and a Ulysses group."""
    tracer, shapes, seen = Tracer(), {}, []
    original = ProcessGroupComm.run

    def run(comm, label, programs):
        verb, own = (programs[0].gi_frame.f_locals[name] for name in ("self", "member"))
        before = len(tracer.collectives)
        result = original(comm, label, programs)
        calls = tracer.collectives[before:]
        assert all(call.lane == "sequence" for call in calls)
        seen.append((label.split()[-1], verb, own, [call.sent for call in calls]))
        return result

    def apply(comm, verb, *tensors):
        sizes = [(x.shape, x.dtype) for x in tensors if x is not None]
        shapes[id(verb)] = verb, sizes  # a verb that is held keeps its id
        return parallel.comm.apply(comm, verb, *tensors)

    monkeypatch.setattr(ProcessGroupComm, "run", run)
    monkeypatch.setattr(ProcessGroupComm, "apply", apply)
    monkeypatch.setattr(rehearsal, "Tracer", lambda **_: tracer)
    split = ["launcher.workers=8", "parallel.cp=4", "parallel.ulysses=2", "parallel.ring=2"]
    made = rehearse(plan(*split), FRAME)
    assert len(seen) > 10
    for direction, verb, own, sent in seen:
        _, tensors = shapes[id(verb)]
        cost = expected_cost(verb, tensors, own).get(direction, Cost(0, 0))
        assert (len(sent), sum(sent)) == (cost.collectives, cost.sent), (verb, direction)
    reduced = {(c.ranks, c.stride) for c in made.collectives if c.lane == "reduce"}
    assert reduced == {(8, 1)}  # gradients, over data and sequence ranks alike


def test_gathered_weights_are_held_besides_the_shards():
    """FSDP2 frees them by resizing; at the peak the root's are whole, and a unit's or two."""
    made = rehearse(plan("launcher.workers=2"), FRAME)
    assert made.at_peak["gathered"] > made.at_peak["weights"] / 2


def test_recomputing_more_holds_less(alone):
    made = [
        rehearse(plan("launcher.workers=1", f"model.activation_checkpointing={mode}"), FRAME)
        for mode in ("block", "selective")
    ]
    peaks = [sum(one.at_peak.values()) for one in (*made, alone)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_frozen_parameters_hold_no_gradients(alone):
    frozen = "recipe.stages.short.frozen=['blocks.*']"
    made = rehearse(plan("launcher.workers=1", frozen), FRAME)
    assert made.at_peak["weights"] == alone.at_peak["weights"]
    assert made.at_peak["optimizer"] < 0.5 * alone.at_peak["optimizer"]
    assert made.update - made.held < 0.5 * (alone.update - alone.held)


def test_a_rank_without_clips_holds_its_state():
    made = rehearse(plan("launcher.workers=2", "recipe.stages.short.global_batch=1"), FRAME)
    assert made.at_peak["weights"] > 0
    assert made.update > made.held  # it reduces gradients with the others


def test_packed_rows_go_one_by_one():
    """Memory is that of one row, work that of all."""
    words = ["recipe.stages.short.global_batch=4", "launcher.workers=1"]
    pack = plan(*words, "data.pack=true", "trainer.accumulate=2")
    (shape, (clips, *_)), parts = clip_shape(pack, FRAME), micro_batches(pack)
    assert (clips, shape.clips, parts) == (1, 1, 4)
    # rows of Waypoint go together
    waypoint = ["experiment=demo", "recipe=waypoint", "stage=1", "data.path=x", "data.pack=true"]
    waypoint += ["recipe.stages.pretrain_360p.global_batch=4", "launcher.workers=1"]
    together = plan_stages(compose([*waypoint, "trainer.accumulate=2"]))[0]
    assert micro_batches(together) == 2
    whole = plan(*words, "trainer.accumulate=2")
    assert (clip_shape(whole, FRAME)[1][0], micro_batches(whole)) == (2, 2)


def test_a_deep_model_is_that_of_two_shallow_ones():
    deep = plan("launcher.workers=1", "model.depth=8")
    whole, extended = rehearse(deep, FRAME), rehearse_deep(deep, FRAME, 0, "student", None)
    assert [part.config.model.depth for part in shallow(deep)] == [4, 6]
    assert extended.held == pytest.approx(whole.held, rel=1e-6)
    assert extended.peak == pytest.approx(whole.peak, rel=1e-3)
    flops = [sum(work.flops for work in one.work.values()) for one in (whole, extended)]
    assert flops[1] == pytest.approx(flops[0], rel=1e-6)


WAN = "{name:wan,latent_channels:24,width:32,heads:4,ffn_width:64,patch_size:1,text_width:0"
WAN += ",activation_checkpointing:block,depth:%d}"


@pytest.mark.parametrize(
    "recompute", [pytest.param("answers", marks=pytest.mark.full), "collectives", "keep_attention"]
)
def test_a_deep_wan_on_a_mesh_is_that_of_two_shallow_ones(recompute):
    """Its blocks are all alike: three and five tell of eight."""
    mesh = ["launcher.workers=4", "parallel.cp=2", f"parallel.recompute={recompute}"]
    deep = plan(f"recipe.stages.short.model={WAN % 8}", *mesh)
    whole, extended = rehearse(deep, FRAME), rehearse_deep(deep, FRAME, 0, "student", None)
    assert extended.held == pytest.approx(whole.held, rel=1e-6)
    assert extended.peak == pytest.approx(whole.peak, rel=1e-3)
    assert extended.at_peak == pytest.approx(whole.at_peak, rel=1e-3)
    flops = [sum(work.flops for work in one.work.values()) for one in (whole, extended)]
    assert flops[1] == pytest.approx(flops[0], rel=1e-6)


@pytest.mark.parametrize("update", [100, 500])
def test_the_optimizers_step_is_planned_where_it_needs_more(update):
    at_peak = {"weights": 100, "optimizer": 50, "activations": 40, "backward": 10}
    made = Rehearsal(max(200, update), at_peak, 150, update, {}, {})
    none = Memory(*[0] * 10)
    assert with_rehearsal(none, made).device == made.peak == max(200, update)
    deeper = replace(made, update=2 * update)
    found = joined(plan("model.depth=20"), [made, deeper])
    assert found.peak == max(found.update, sum(found.at_peak.values()))


def test_experts_are_shortened_together():
    """A network of experts is as deep as each of them, and none where they differ."""
    one = plan(f"recipe.stages.short.model={WAN % 12}").config.model
    pair = ExpertsConfig("experts", 24, "none", {"high": one, "low": one}, (0.5, 0.0))
    assert pair.blocks() == one.blocks() == (12, 1)
    assert [own.depth for own in pair.with_blocks(4).experts.values()] == [4, 4]
    uneven = replace(pair, experts={"high": one, "low": one.with_blocks(4)})
    assert uneven.blocks() == (0, 0)


def test_patterns_of_blocks_that_are_left_out_do_not_hinder():
    deep = plan("launcher.workers=1", "model.depth=8", "recipe.stages.short.frozen=['blocks.7.*']")
    assert shortened(deep, {"student": 2}).config.frozen == ()


def test_kernels_of_a_device_that_is_absent_hold_less_than_the_plain_ones(alone):
    heads = "model.heads=2"  # of 16 channels, the narrowest that the kernels take
    fused = rehearse(plan("launcher.workers=1", heads), FRAME, device=("cuda", (9, 0)))
    assert fused.at_peak["activations"] < 0.85 * alone.at_peak["activations"]
    launched = {name for _, name in fused.work if name.startswith("triton.")}
    assert {"triton.gram_kernel", "triton.gram_backward_kernel"} <= launched


def test_attention_and_products_have_flops(alone):
    counted = {name for (_, name), work in alone.work.items() if work.flops}
    assert any("flash_attention" in name for name in counted)
    assert {"aten.mm.default", "aten.addmm.default"} & counted


def test_one_storage_under_many_tensors_counts_once():
    with (tracer := Tracer()):
        whole = torch.zeros(1000)
        parts = [whole[i : i + 100] for i in range(0, 1000, 100)]
        assert tracer.now == 4000
        tracer.claim(parts, "parts")
        assert tracer.alive["parts"] == 4000
        del whole, parts
        assert tracer.now == 0
    assert tracer.peak == 4000


def test_a_kept_rehearsal_is_read_again_and_any_change_makes_it_anew(tmp_path, alone, monkeypatch):
    calls = []

    def make(*given, **named):
        calls.append(given)
        return alone

    monkeypatch.setattr(kept, "rehearse", make)

    def again(*words):
        job = kept.Job(plan("launcher.workers=1", *words), FRAME, "student", "cpu")
        assert kept.kept_or_made([job, job], keep=tmp_path) == [alone, alone]

    again()
    again("recipe.stages.short.steps=7", "recipe.stages.short.optimizer.lr=1")  # the same shapes
    assert len(calls) == 1
    again("trainer.accumulate=2")
    again("model.width=64")
    assert len(calls) == 3
    (path, *_) = tmp_path.glob("*.json")
    path.write_text(json.dumps({"peak": 1}))
    for words in ([], ["trainer.accumulate=2"], ["model.width=64"]):
        again(*words)
    assert len(calls) == 4


def test_device_memory_is_what_the_rehearsal_saw(alone):
    formula = Memory(10, 10, 1, 2, 3, 4, 5, 6, 7, staging=8)
    memory = with_rehearsal(formula, alone)
    assert memory.device == sum(alone.at_peak.values())
    assert (memory.parameters, memory.staging) == (10, 8)


@pytest.fixture
def planned_memory(monkeypatch):
    """The benchmark as a module that the processes which it starts can import, too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("planned_memory")


@pytest.mark.full
def test_drawn_configurations_are_within_ten_percent_of_real_processes(planned_memory):
    for role, words in planned_memory.draw(seed=5, count=6):
        measured = planned_memory.measured_bytes(words, role)
        assert planned_memory.planned_bytes(words, role) == pytest.approx(measured, rel=0.1), words


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["1x4", "2x2", "4x1"])
def test_what_recomputation_keeps_is_planned_as_processes_hold_it(mesh, planned_memory):
    """MoWorld's facts §4.2: 4 + 2 (R - 1) activations a block of collective answers, 5 or 1 of
    attention. The whole step and this part of it."""
    found = planned_memory.tape(mesh)
    for planned, measured, own, true in found.values():
        assert planned == pytest.approx(measured, rel=0.1)
        assert own == pytest.approx(true, rel=0.1)
    assert found["answers"][3] > found["collectives"][1] / 2, "the tape is a large part of it"
