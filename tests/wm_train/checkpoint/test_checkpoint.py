"""Checkpoints are whole or absent: every damage is found before a tensor is used, and the one
before is taken."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch

from wm_train.checkpoint import manifest, store, writer
from wm_train.world import World

ALONE = World(0, 1)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(7, 5, generator=g),
        "model/bias": torch.randn(7, generator=g).to(torch.bfloat16),
        "model/empty": torch.zeros(0, 3),
        "optimizer/step": torch.tensor(float(seed)),
    }


def save(root, step, seed=0):
    return writer.save(root, step, "short", tensors(seed), {"seed": seed}, ALONE)


def newest(root):
    reports = []
    return store.find_newest(root, ALONE, reports.append, mine=True), reports


def test_round_trip_is_bitwise(tmp_path):
    folder = save(tmp_path, 3, seed=1)
    found, reports = newest(tmp_path)
    assert found is not None
    assert found[0] == folder
    assert found[1].facts == {"seed": 1}
    assert not reports
    targets = {n: torch.empty_like(t).fill_(7) for n, t in tensors(1).items()}
    store.load(*found, targets)
    for name, tensor in tensors(1).items():
        assert torch.equal(targets[name], tensor), name


def test_every_flipped_bit_is_found_and_the_previous_checkpoint_taken(tmp_path):
    good = save(tmp_path, 1)
    draws = random.Random(0)
    for step in range(2, 62):
        folder = save(tmp_path, step)
        victim = draws.choice(sorted(folder.iterdir()))
        data = bytearray(victim.read_bytes())
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        victim.write_bytes(data)
        found, reports = newest(tmp_path)
        assert found is not None, victim
        assert found[0] == good, victim
        assert len(reports) == 1
        assert "quarantined" in reports[0]


@pytest.mark.parametrize(
    "damage", ["truncate", "remove", "empty", "swap", "foreign", "no manifest", "format"]
)
def test_damaged_folders_are_refused_with_a_reason(tmp_path, damage):
    good, folder = save(tmp_path, 1), save(tmp_path, 2, seed=2)
    file = folder / "rank_00000.safetensors"
    if damage == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "remove":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "swap":
        shutil.copy(good / file.name, file)
    elif damage == "foreign":
        (folder / "extra.pt").write_bytes(b"x")
    elif damage == "no manifest":
        (folder / manifest.NAME).unlink()
    elif damage == "format":
        read = manifest.read_manifest(folder)
        (folder / manifest.NAME).write_text(
            manifest.to_text(manifest.Manifest(**{**vars(read), "format": 99}))
        )
    found, reports = newest(tmp_path)
    assert found is not None
    assert found[0] == good
    words = {
        "truncate": "bytes",
        "remove": "missing files",
        "empty": "bytes",
        "swap": "sha256",
        "foreign": "foreign files",
        "no manifest": "no manifest.json",
        "format": "format 99",
    }
    assert words[damage] in reports[0]


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    folder = save(tmp_path, 1)
    read = manifest.read_manifest(folder)
    evil = {**vars(read), "files": {**read.files, "../../etc/passwd": {"size": 1, "sha256": "0"}}}
    (folder / manifest.NAME).write_text(manifest.to_text(manifest.Manifest(**evil)))
    with pytest.raises(manifest.CheckpointError, match="plain name"):
        store.check(folder, ALONE)


def test_an_unfinished_draft_is_never_found_and_is_cleaned(tmp_path):
    good = save(tmp_path, 1)
    draft = tmp_path / "step_00000002.tmp-dead"
    shutil.copytree(good, draft)
    assert newest(tmp_path)[0][0] == good
    writer.prune(tmp_path, 2, 0, ALONE)
    assert not draft.exists()


def test_load_lists_every_wrong_name_and_changes_nothing(tmp_path):
    folder = save(tmp_path, 1)
    read = store.check(folder, ALONE)
    targets = {
        "model/weight": torch.full((7, 6), 9.0),
        "model/bias": torch.full((7,), 9.0),
        "model/new": torch.full((1,), 9.0),
    }
    with pytest.raises(
        manifest.CheckpointError,
        match=r"missing model/new; extra model/empty.*model/weight has shape \[7, 5\]",
    ):
        store.load(folder, read, targets)
    assert all(bool((t == 9).all()) for t in targets.values())


def test_a_failed_save_leaves_the_last_one_and_the_next_save_works(tmp_path, monkeypatch):
    good = save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        with pytest.raises(manifest.CheckpointError, match="No space left"):
            save(tmp_path, 2)
    assert [p.name for p in store.committed(tmp_path)] == [good.name]
    assert newest(tmp_path)[0][0] == good
    assert save(tmp_path, 2).exists()


@pytest.mark.parametrize(
    ("keep_every", "kept"), [(0, [7, 10]), (4, [4, 7, 10]), (1, [1, 2, 4, 7, 10])]
)
def test_retention_keeps_the_newest_and_every_nth(tmp_path, keep_every, kept):
    for step in (1, 2, 4, 7, 10):
        save(tmp_path, step)
    writer.prune(tmp_path, 2, keep_every, ALONE)
    assert [p.name for p in store.committed(tmp_path)] == [f"step_{step:08d}" for step in kept]
    assert (tmp_path / "latest").read_text() == "step_00000010\n"


def mutate(value, draws: random.Random):
    """The same JSON tree with one node dropped, repeated, retyped or pushed out of range."""
    if isinstance(value, dict) and value and draws.random() < 0.85:
        key = draws.choice(sorted(value))
        if draws.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(value[key], draws)}
    if isinstance(value, list) and value and draws.random() < 0.8:
        place = draws.randrange(len(value))
        return [*value[:place], mutate(value[place], draws), *value[place + draws.randrange(2) :]]
    return draws.choice(
        [None, True, -1, 2**70, 0.5, "x", "../../etc/passwd", [], {}, [value], {"a": value}]
    )


def test_mutated_manifests_with_a_right_hash_are_one_clear_error_or_harmless(tmp_path):
    folder, draws = save(tmp_path, 1), random.Random(0)
    body = json.loads((folder / manifest.NAME).read_text())["body"]
    messages = []
    for _ in range(2000):
        changed = mutate(body, draws)
        text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        (folder / manifest.NAME).write_text(
            f'{{"body":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'
        )
        targets = {name: torch.empty_like(tensor) for name, tensor in tensors(0).items()}
        try:
            store.load(folder, store.check(folder, ALONE), targets)
        except manifest.CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 1500
    assert all("Fix:" in message for message in messages)


def test_text_that_is_no_manifest_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    for text in ("", "[]", "{}", "null", '{"body":1,"sha256":"0"}', "[" * 100_000, "\x00\xff"):
        (folder / manifest.NAME).write_text(text)
        with pytest.raises(manifest.CheckpointError):
            store.check(folder, ALONE)
