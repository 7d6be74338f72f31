"""The name of a stage keys its randomness, so a recipe may grow around a half-trained stage."""

from __future__ import annotations

import shutil

import pytest
import torch

from data_shards.loading.order import SampleOrder
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest, to_text
from wm_train.errors import SetupError
from wm_train.noise import normal
from wm_train.tracking.tracker import read_steps
from wm_train.training.data import open_loader
from wm_train.training.resume import inherit
from wm_train.training.state import build_state, identity

BEFORE = "+recipe.stages.before={index: 0, frames: 41, global_batch: 2, steps: 1}"
STEPS = "recipe.stages.short.steps="


def draws_of(stage):
    """The clips of three batches, their noise, and what a checkpoint would say of the stage."""
    with open_loader(stage, "train", stage.config.global_batch) as loader:
        batches = [next(loader) for _ in range(3)]
    noise = normal(stage.noise, "noise", torch.arange(4), (0, 2), (3,))
    return [batch.keys for batch in batches], noise, identity(stage.plan, stage.data_fingerprint)


def test_a_stage_inserted_before_another_changes_neither_its_data_nor_its_noise(stage_of):
    clips, noise, known = draws_of(stage_of())
    later_clips, later_noise, later_known = draws_of(stage_of(BEFORE))
    assert later_clips == clips
    assert torch.equal(later_noise, noise)
    assert later_known == known
    assert known["noise"] == {"stage": "short", "keying": 2}


def test_two_stages_of_one_recipe_draw_different_noise_and_samples(stage_of):
    clips, noise, _ = draws_of(stage_of(BEFORE))
    other_clips, other_noise, _ = draws_of(stage_of(BEFORE, "stage=before"))
    assert other_clips != clips
    assert not torch.isin(other_noise, noise).any()
    assert SampleOrder(100, 0, "short").sample(0) != SampleOrder(100, 0, "before").sample(0)


def test_a_half_trained_stage_goes_on_alike_when_the_recipe_has_grown(train_here, tmp_path):
    quick = ("trainer.async_checkpoint=false", "trainer.checkpoint_every=2")
    train_here(tmp_path / "cut", STEPS + "2", *quick)
    shutil.copytree(tmp_path / "cut", tmp_path / "grown")
    train_here(tmp_path / "cut", STEPS + "4", *quick)
    train_here(tmp_path / "grown", STEPS + "4", BEFORE, *quick)
    stages = [tmp_path / which / "demo" / "short" for which in ("cut", "grown")]
    rows = [read_steps(stage / "metrics.jsonl") for stage in stages]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows[1]] == [row["loss"] for row in rows[0]]


def test_a_checkpoint_whose_noise_was_keyed_by_position_is_not_continued(train_here, tmp_path):
    quick = (STEPS + "2", "trainer.async_checkpoint=false")
    train_here(tmp_path, *quick)
    folder = store.committed(tmp_path / "demo" / "short" / "checkpoints")[-1]
    manifest = read_manifest(folder)
    del manifest.facts["identity"]["noise"]
    (folder / "manifest.json").write_text(to_text(manifest))
    with pytest.raises(SetupError, match=r"keyed by the stage's position.*Fix: name=<new run>"):
        train_here(tmp_path, STEPS + "3", "trainer.async_checkpoint=false")


def test_a_source_of_another_frame_rate_is_named(train_here, stage_of, tmp_path):
    train_here(tmp_path, STEPS + "1", "trainer.async_checkpoint=false")
    folder = store.committed(tmp_path / "demo" / "short" / "checkpoints")[-1]
    manifest = read_manifest(folder)
    assert manifest.facts["fps"] == 16.0
    stage, said = stage_of(f"recipe.stages.short.inherit={folder.parent}"), []
    state = build_state(stage.plan, stage.mesh.fsdp, stage.backend.device)
    inherit(stage.plan, state, stage.world, said.append, 16.0)
    assert not any("frames per second" in line for line in said)
    manifest.facts["fps"] = 8.0
    (folder / "manifest.json").write_text(to_text(manifest))
    inherit(stage.plan, state, stage.world, said.append, 16.0)
    assert "clips of 16 frames per second, its source was trained on 8: from latent" in said[-2]
    assert "0.5 times as far" in said[-2]
