"""Two pools that train each its own expert, then both as one network, then each its own again: the
weights are handed over by name, to the bit."""

from __future__ import annotations

import pytest
import torch

from wm_train.backends import get_backend
from wm_train.checkpoint import store
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage, plan_stages
from wm_train.config.pools import pool_runs
from wm_train.console import Progress
from wm_train.evaluation.checkpoints import load_weights
from wm_train.resilience.preemption import StopRequest
from wm_train.tracking.tracker import read_steps
from wm_train.trainer import train_stage
from wm_train.training.networks import build_networks
from wm_train.training.resume import restore
from wm_train.training.stage import open_stage
from wm_train.training.state import build_for_evaluation
from wm_train.world import World, join_world, leave_world

WAN = (
    "{name:wan,latent_channels:24,depth:1,width:24,heads:2,ffn_width:32,patch_size:1,text_width:0,"
    "camera:true,camera_stride:8}"
)
HISTORY = "{chunk:2,recent:1,near:1}"
LEVELS = "[1.0,0.9,0.5,0.3]"
SHORT, LONG, AGAIN = (f"recipe.stages.{name}." for name in ("short", "long", "again"))
PLAIN = "optimizer={lr:1.0e-3,warmup_steps:0,schedule:constant,ema_decay:0.5}"
INSIDE = PLAIN.replace("=", ":", 1)
FRAMES = (f"{LONG}frames=41", f"{LONG}global_batch=2")
STAGES = (
    *(f"{SHORT}{text}" for text in ("steps=2", f"model={WAN}", PLAIN)),
    f"{LONG}pools=together",
    f"{LONG}steps=4",
    f"{LONG}model={WAN}",
    *FRAMES,
    f"{LONG}objective={{name:distribution_matching}}",
    f"{LONG}{PLAIN}",
    f"{LONG}sampler={{name:windows,levels:{LEVELS},step:renoise,history:{HISTORY}}}",
    f"{LONG}turns=CCS",
    f"{LONG}roles={{teacher:{{inherit:short}},critic:{{inherit:short,{INSIDE}}}}}",
    f"{LONG}distill={{levels:{LEVELS},schedule:windows,history:{HISTORY},gate:warn,weight:velocity,"
    "score_sigma:{per:turn}}",
    f"+recipe.stages.again={{index:3,frames:41,steps:1,global_batch:2,inherit:previous,model:{WAN},"
    f"objective:{{name:flow_matching}},{INSIDE}}}",
    "+pools={high:{sigma_min:0.7,sigma_max:1.0},low:{sigma_min:0.0,sigma_max:0.7}}",
    "trainer.validate_every=0",
    "trainer.async_checkpoint=false",
)


def weights_in(plan, world) -> dict[str, torch.Tensor]:
    """The averaged weights of a stage's newest checkpoint."""
    folder, manifest = store.find_newest(plan.checkpoints, world, print)
    held = {n: torch.empty(t.shape) for n, t in manifest.tensors.items() if n.startswith("ema/")}
    store.load(folder, manifest, held, may_ignore=manifest.tensors)
    return {name.removeprefix("ema/"): tensor for name, tensor in held.items()}


@pytest.fixture
def world():
    yield join_world(get_backend("cpu"), 60.0)
    leave_world()


def test_experts_are_handed_over_to_the_bit_and_one_learns_in_a_turn(demo_lines, tmp_path, world):
    lines = demo_lines(tmp_path, "stage=all", *STAGES)
    runs = pool_runs(compose(lines), lines)
    assert {pool: [plan.stage for plan in plan_stages(run)] for pool, run in runs.items()} == {
        "high": ["short", "again"],
        "low": ["short", "again"],
        "": ["long"],
    }
    backend = get_backend("cpu")

    def train(pool: str, stage: str):
        plan = plan_stage(runs[pool], stage)
        train_stage(plan, backend, world, Progress(speaks=False), StopRequest())
        return plan

    before = {pool: weights_in(train(pool, "short"), world) for pool in ("high", "low")}
    assert before["high"].keys() == before["low"].keys()

    plan = plan_stage(runs[""], "long")
    mesh = open_stage(plan, backend, world).mesh.fsdp
    state = build_networks(plan, mesh, backend.device)
    restore(plan, state, "", World(0, 1), lambda line: None)
    for network in (state, state.roles["critic"]):
        held = network.weights()
        assert len(held) == 2 * len(before["high"])
        for name, tensor in held.items():
            pool, _, own = name.partition(".")
            assert torch.equal(tensor, before[pool][own])
    teacher = dict(state.frozen["teacher"].named_parameters())
    assert torch.equal(teacher["low.proj_out.bias"], before["low"]["proj_out.bias"])

    train("", "long")
    folder, manifest = store.find_newest(plan.checkpoints, world, print)
    moved = {n: torch.empty(t.shape) for n, t in manifest.tensors.items() if n.startswith("model/")}
    store.load(folder, manifest, moved, may_ignore=manifest.tensors)
    changed = {
        pool
        for name, tensor in moved.items()
        for pool, _, own in [name.removeprefix("model/").partition(".")]
        if not torch.equal(tensor, before[pool][own])
    }
    assert len(changed) == 1  # the student had one turn, whose exit is in one expert's range
    rows = read_steps(plan.directory / "metrics.jsonl")
    counted = {name: sum(row.get(f"student/updates_{name}", 0) for row in rows) for name in before}
    assert counted == {name: float(name in changed) for name in before}

    together = weights_in(plan, world)
    for pool in ("high", "low"):
        later = plan_stage(runs[pool], "again")
        own = build_networks(later, mesh, backend.device)
        restore(later, own, "", World(0, 1), lambda line: None)
        for name, tensor in own.weights().items():
            assert torch.equal(tensor, together[f"{pool}.{name}"])
    judged = build_for_evaluation(plan, mesh, backend.device)
    load_weights(judged, folder, manifest)
