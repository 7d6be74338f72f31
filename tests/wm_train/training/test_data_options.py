"""The keys of `data.` through the loader that training uses: selections, the cache, and which
faults of the data end a run for good."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_shards.schema import DataError, ShardError
from data_shards.storage.read import open_dataset
from wm_train import worker
from wm_train.config.typed import to_json
from wm_train.errors import SetupError
from wm_train.models.examples import ExampleShape
from wm_train.models.flops import forward_flops
from wm_train.resilience.preemption import StopRequest
from wm_train.training.data import open_loader
from wm_train.training.stage import Stage, open_data
from wm_train.world import leave_world

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def selection(gameplay, tmp_path):
    """(file that keeps every second training clip and one held-out clip, the keys it keeps)"""
    dataset = open_dataset(str(gameplay))
    kept = [
        *[entry.key for entry in dataset.clips("train")][::2],
        dataset.clips("validation")[0].key,
    ]
    file = tmp_path / "selection.json"
    file.write_text(
        json.dumps({"dataset_fingerprint": dataset.info.fingerprint, "kept": kept, "dropped": {}})
    )
    return file, kept


def keys_of(stage: Stage, split: str, batches: int) -> set[str]:
    with open_loader(stage, split, 2) as feed:
        return {key for _ in range(batches) for key in next(feed).keys}


def test_a_selection_holds_in_training_and_in_validation(stage_of, selection):
    file, kept = selection
    stage = stage_of(f"data.selection=[{file}]")
    assert keys_of(stage, "train", 8) == set(kept[:-1])
    assert keys_of(stage, "validation", 2) == {kept[-1]}
    assert stage.data_fingerprint == stage.dataset.fingerprint != stage.dataset.info.fingerprint


def test_of_a_mixture_each_selection_finds_its_data_set(gameplay, selection, demo_run, tmp_path):
    file, kept = selection
    other = shutil.copytree(gameplay, tmp_path / "other")
    facts = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**facts, "fingerprint": "another"}))
    data = demo_run(tmp_path, f"data.selection=[{file}]").data
    dataset, mixture = open_data(
        dataclasses.replace(data, mixture={str(other): 1.0, str(gameplay): 2.0})
    )
    assert [len(each.clips("train")) for each in mixture] == [
        len(open_dataset(str(gameplay)).clips("train")),
        len(kept) - 1,
    ]
    assert dataset in mixture
    with pytest.raises(DataError, match="made for another data set"):
        open_data(dataclasses.replace(data, path=str(other)))


@pytest.mark.full
def test_flops_are_those_of_the_picture_that_a_clip_has(stage_of, gameplay, tmp_path):
    """Attention grows with the square of a picture's tokens too, so a mixture of sizes needs a
    count for each."""
    wide = shutil.copytree(gameplay, tmp_path / "wide")
    facts = json.loads((wide / "dataset.json").read_text())
    (wide / "dataset.json").write_text(
        json.dumps({**facts, "latent_width": 2 * facts["latent_width"]})
    )
    stage = stage_of(f"data.mixture={{{gameplay}: 1, {wide}: 1}}")
    height, width = facts["latent_height"], facts["latent_width"]
    for size in ((height, width), (height, 2 * width)):
        for length in (2, 6):
            exact = forward_flops(stage.config.model, ExampleShape(1, length, *size, 8, 0))
            assert stage.clip_flops(length, *size) == pytest.approx(exact, rel=1e-3)


@pytest.mark.full
def test_another_selection_is_another_run(train_here, selection, tmp_path):
    file, _ = selection
    few = [
        "recipe.stages.short.steps=2",
        "trainer.checkpoint_every=1",
        "recipe.stages.short.optimizer.warmup_steps=1",
    ]
    train_here(tmp_path, *few, f"data.selection=[{file}]", "trainer.validation_clips=4")
    train_here(tmp_path, *few, f"data.selection=[{file}]", "recipe.stages.short.steps=3")
    with pytest.raises(SetupError, match=r"data was .* and is now"):
        train_here(tmp_path, *few)


def test_what_was_read_once_comes_from_the_cache(stage_of, gameplay, tmp_path):
    copy = shutil.copytree(gameplay, tmp_path / "set")
    where = [f"data.path={copy}", f"data.cache={tmp_path / 'cache'}", "data.retry_s=0.1"]

    def batches(*overrides: str) -> list[torch.Tensor]:
        with open_loader(stage_of(*overrides), "train", 2) as feed:
            return [next(feed).latents for _ in range(4)]

    first = batches(*where)
    for shard in (copy / "shards").iterdir():
        shard.unlink()
    assert all(map(torch.equal, batches(*where), first))
    held = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*"))
    assert held > 4 * 2 * first[0][0].numel()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ShardError, match="cannot read it"):
        batches(*where)


@pytest.mark.parametrize(("number", "passing"), [(errno.ETIMEDOUT, True), (errno.EIO, False)])
def test_silent_storage_is_not_taken_for_bad_shards(stage_of, monkeypatch, number, passing):
    """With `quarantine` a disk's bad sectors cost their shard; storage that is away would cost all
    of them, so it ends the attempt."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    stage = stage_of("data.on_bad_shard=quarantine", "data.retry_s=0.1")
    with open_loader(stage, "train", 2) as feed:
        with pytest.raises(
            DataError, match="answers" if passing else "expected clips left|got all shards"
        ) as caught:
            next(feed)
        assert caught.value.passing == passing
        assert bool(feed.quarantined) != passing


@pytest.mark.parametrize(("passing", "code"), [(True, 74), (False, 2)])
def test_silent_storage_is_tried_again_and_damage_is_not(
    demo_run, tmp_path, monkeypatch, capsys, passing, code
):
    monkeypatch.setattr(StopRequest, "listen", lambda self: self)
    config = tmp_path / "run.json"
    config.write_text(to_json(demo_run(tmp_path, "launcher.preflight=false")))

    def work(*_: object) -> None:
        raise ShardError("shard: it is so", "shards/000000.tar", passing)

    try:
        assert worker.main(["--config", str(config)], work) == code
    finally:
        leave_world()
    assert re.search(r"^rank 0 on \S+: shard: it is so$", capsys.readouterr().err, re.M)


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "where"),
    [("torchrun", "in a shard"), ("torchrun", "beside the shards"), ("ray", "in a shard")],
)
def test_a_damaged_data_set_ends_the_run_at_once_with_one_report(
    gameplay, tmp_path, monkeypatch, launcher, where
):
    """Two real workers, restarts allowed: none is used up, whichever rank finds it and whenever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    copy = shutil.copytree(gameplay, tmp_path / "set")
    dataset = open_dataset(str(copy))
    victim = dataset.clips("train")[0]
    file = copy / (victim.shard if where == "in a shard" else "index.parquet")
    data, member = bytearray(file.read_bytes()), dataset.members(victim)["latent.npy"]
    data[member.data_offset + 5 if where == "in a shard" else len(data) // 2] ^= 1
    file.write_bytes(data)
    small = [
        "model.width=32",
        "model.depth=1",
        "recipe.stages.short.frames=9",
        "recipe.stages.short.global_batch=2",
        "trainer.samples=0",
    ]
    where_to = [f"launcher={launcher}", "tracker=none", f"data.path={copy}", f"out={tmp_path}"]
    command = ["wm_train.launch", "experiment=demo", "recipe=demo", "stage=1", *where_to]
    command = [sys.executable, "-m", *command, "launcher.max_restarts=3", *small]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "restart 1" not in said
    found = (
        f"shard {victim.shard}, key {victim.key}, field latent.npy"
        if where == "in a shard"
        else "index: cannot read"
    )
    last = said[said.rindex("'s last lines:") :]  # behind what its peer and torchrun say
    assert re.search(
        rf"^rank (\d) on \S+: .*{found}.*Fix: .*\nrank \1 died: exit code 2", last, re.M
    ), said
