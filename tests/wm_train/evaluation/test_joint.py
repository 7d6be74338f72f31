"""Judging experts: only their weights are loaded, in the type they compute in, and the losses stay
what they were."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wm_train import joint
from wm_train.boxes import local_tensor
from wm_train.checkpoint import store
from wm_train.config.pools import with_range
from wm_train.config.typed import to_json
from wm_train.evaluation.held_out import held_out_loss
from wm_train.training import state

POOLS = ("+pools={high: {sigma_min: 0.6, sigma_max: 1.0}, low: {sigma_min: 0.0, sigma_max: 0.6}}",)
HELD_OUT = "trainer.validation_clips=2"


@pytest.fixture(scope="module")
def trained(train_here, tmp_path_factory) -> Path:
    """The run folder of a stage of two steps, which keeps an average."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder, "recipe.stages.short.steps=2", "trainer.async_checkpoint=false")
    return folder


def loss_of_training_state(stage) -> dict[str, float]:
    """The held-out loss of everything that training keeps, on its average."""
    folder, manifest = store.find_newest(stage.plan.checkpoints, stage.world, print)
    whole = state.build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    store.load(folder, manifest, whole.tensors())
    return held_out_loss(stage, whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_expert_is_its_averaged_weights_and_nothing_else(
    trained, stage_of, monkeypatch, precision
):
    stage = stage_of(f"out={trained}", HELD_OUT, f"parallel.precision={precision}")
    expected = loss_of_training_state(stage)
    names, load = [], store.load

    def spy(folder, manifest, targets, *rest, **more):
        names.extend(targets)
        load(folder, manifest, targets, *rest, **more)

    monkeypatch.setattr(store, "load", spy)
    monkeypatch.delattr("wm_train.optim.adamw.build_adamw")  # making an optimizer now fails
    expert, steps = joint.load_state(stage.plan, stage, stage.world)
    assert steps == 2
    assert held_out_loss(stage, expert) == expected
    parameters = dict(expert.model.named_parameters())
    unused = expert.model.unused_parameters()
    assert sorted(names) == sorted(
        ("model/" if name in unused else "ema/") + name for name in parameters
    )
    half = torch.float32 if precision == "fp32" else torch.bfloat16
    exact = {id(p) for unit in expert.model.exact_units() for p in unit.parameters()}
    for parameter in parameters.values():
        wanted = torch.float32 if id(parameter) in exact else half
        assert local_tensor(parameter).dtype == wanted
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_without_an_average_an_expert_is_its_weights_as_trained(train_here, stage_of, tmp_path):
    settings = ("recipe.stages.short.optimizer.ema_decay=0", "recipe.stages.short.steps=2")
    train_here(tmp_path, *settings)
    stage = stage_of(f"out={tmp_path}", HELD_OUT, *settings)
    expert, _ = joint.load_state(stage.plan, stage, stage.world)
    assert held_out_loss(stage, expert) == loss_of_training_state(stage)


def test_a_checkpoint_with_more_parameters_than_the_model_is_refused(trained, stage_of):
    stage = stage_of(f"out={trained}", "model.depth=2")
    with pytest.raises(store.CheckpointError, match=r"extra ema/blocks\.2"):
        joint.load_state(stage.plan, stage, stage.world)


@pytest.mark.full
def test_experts_are_judged_alike_on_one_process_and_sharded_over_two(
    trained, demo_run, run_ranks, tmp_path
):
    for pool in ("high", "low"):
        shutil.copytree(trained / "demo" / "short", tmp_path / "demo" / pool / "short")
        run = demo_run(tmp_path, HELD_OUT, *POOLS)
        own = with_range(replace(run, pool=pool), run.pools[pool])
        (tmp_path / "demo" / pool / "short" / "config.json").write_text(to_json(own))
    found = []
    for workers in (1, 2):
        file = tmp_path / f"{workers}.json"
        file.write_text(
            to_json(demo_run(tmp_path, HELD_OUT, *POOLS, f"launcher.workers={workers}"))
        )
        run_ranks(workers, "-m", "wm_train.joint", "--config", file)
        found.append(
            json.loads((tmp_path / "demo" / "joint" / "short" / "losses.json").read_text())
        )
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-6)
