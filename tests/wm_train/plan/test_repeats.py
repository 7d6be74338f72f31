"""Passes of a rollout that run once and are counted again: the same operators, bytes, collectives
and peak as when each of them runs."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from parallel.comm import SoloComm
from parallel.layout import ClipLayout
from parallel.masks import AttentionMask, Tile
from parallel.packed import CleanPass, NoisyPass
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence
from wm_train.compat import FakeTensorMode
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.pools import pool_runs
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import rehearse
from wm_train.plan.repeated.blocks_once import Kinds, attention_once
from wm_train.plan.repeated.passes import storage
from wm_train.plan.tracing import Tracer
from wm_train.sampling import history

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
# tensors that stand for what a pass returned; views, some of which FSDP2 makes in a first pass only
ATTENTION = ("block_attention", "block_attention_backward")
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


@pytest.mark.parametrize("mode", ["selective", "block", "none"])
def test_blocks_of_the_same_tiles_are_the_step_in_full_in_each_way_to_checkpoint(mode):
    """A block that keeps some results sees each of its operators: none is counted only."""
    own = [*SMALL, "model.depth=4", f"model.activation_checkpointing={mode}", "data.path=x"]
    (plan,) = plan_stages(compose(["experiment=demo", "recipe=demo", "stage=1", *own]))
    whole, short = (rehearse(plan, FRAME, once=once) for once in (False, True))
    assert work_of(short) == work_of(whole)
    assert short.held == whole.held
    assert short.peak == pytest.approx(whole.peak, rel=0.01)


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


@pytest.mark.parametrize(
    ("stage", "role"),
    [
        ("ar", "student"),
        pytest.param("distill", "student", marks=pytest.mark.full),
        pytest.param("distill", "critic", marks=pytest.mark.full),
    ],
)
def test_windows_chosen_by_cameras_are_rehearsed(stage, role):
    """Poses have no values there; numbers in their place choose as many frames. Nor have the
    weights of a teacher that is whole on one worker, whose shapes torch has not seen before."""
    FakeTensorMode.cache_clear()
    lines = ["experiment=demo", "recipe=moworld", f"stage={stage}", "data.path=x"]
    pools = [] if stage == "distill" else ["pool=high"]
    config = compose([*lines, *pools])
    run = next(iter(pool_runs(config, [*lines, *pools], None).values()))
    (plan,) = plan_stages(run)
    frame, read = Frame(channels=24, height=8, width=8, temporal_stride=8), history.host_numbers
    whole, short = (rehearse(plan, frame, role=role, once=once) for once in (False, True))
    assert history.host_numbers is read
    assert work_of(short) == work_of(whole)
    assert short.collectives == whole.collectives
    assert short.held == whole.held
    assert short.peak == pytest.approx(whole.peak, rel=0.01)


def test_packed_passes_that_repeat_are_counted_and_keep_their_keys():
    layout, mask = ClipLayout(6, chunk_starts=tuple(range(6))), AttentionMask("frame", window=3)
    found = []
    for once in (False, True):
        with FakeTensorMode(), torch.no_grad(), (tracer := Tracer()):
            ran, kinds = [], Kinds(tracer)

            def block(x, sequence, ran=ran):
                ran.append(type(sequence))
                keys = x * 2
                return sequence.attend(x, keys, keys + x, mask)

            run = kinds.once(block, "block") if once else block
            clip, x = GroupSequence(layout, SoloComm()), torch.empty(1, 6, 4, 2, 8)
            clean = CleanPass(clip)
            y = [run(x, clean), run(x, clean)]
            noisy = NoisyPass(clip, clean.kept)
            y += [run(x, noisy), run(x, noisy)]
            with pytest.raises(ValueError, match="got verb call 3, expected 2"):
                noisy.attend(x, x, x, mask)
        kept = [tuple(x.shape for x in pair) for pair in clean.kept]
        shared = len({storage(x) for pair in clean.kept for x in pair})
        views = [(one.shape, one.stride(), one.dtype) for one in y]
        found.append((len(ran), work_of(tracer), kept, shared, views, tracer.peak))
    whole, short = found
    assert (whole[0], short[0]) == (4, 2)
    assert short[1:5] == whole[1:5]
    assert short[5] == pytest.approx(whole[5], rel=0.05)


def test_attention_of_the_same_tiles_runs_once_also_for_gradients():
    tiles = (Tile(None, (0, 2), ((0, 2),)), Tile(None, (2, 4), ((0, 1), (2, 4))))
    other = (Tile(None, (0, 4), ((0, 4),)),)
    found = []
    for once in (False, True):
        with FakeTensorMode(), torch.no_grad(), (tracer := Tracer()):
            ran = Counter()

            def noted(name, ran=ran):
                def run(*given):
                    ran[name] += 1
                    return getattr(REFERENCE, name)(*given)

                return run

            kernels = REFERENCE._replace(**{name: noted(name) for name in ATTENTION})
            kernels = attention_once(kernels, tracer) if once else kernels
            q = torch.empty(1, 4, 3, 2, 8)
            for own in (tiles, tiles, other):
                out, lse = kernels.block_attention(q, q, q, own)
                gradients = kernels.block_attention_backward(out, q, q, q, out, lse, own)
        sizes = [(x.shape, x.stride(), x.dtype) for x in (out, lse, *gradients)]
        found.append((work_of(tracer), sizes, tracer.peak))
    assert found[0][:2] == found[1][:2]
    assert ran == dict.fromkeys(ATTENTION, 2)


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
