"""Respect whose a checkpoint is: readers change nothing, `prune` deletes only what is ours, names
are not believed, and two runs never save in one place."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from wm_train.checkpoint import store, writer
from wm_train.checkpoint.__main__ import main
from wm_train.checkpoint.manifest import MisnamedError, read_manifest
from wm_train.checkpoint.saver import Saver
from wm_train.config.schema import TrainerConfig
from wm_train.resilience.run_lock import COMMAND, owned
from wm_train.storage import place
from wm_train.world import World

ALONE = World(0, 1)


def save(root, step: int, **facts) -> Path:
    tensors = {"model/a": torch.full((3,), float(step))}
    return writer.save(root, step, "short", tensors, facts, ALONE)


def flip(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def listing(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def names(root) -> list[str]:
    return [folder.name for folder in store.committed(root)]


def test_a_reader_takes_the_one_before_and_changes_nothing(tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    flip(bad)
    before, reports = listing(tmp_path), []
    assert store.find_newest(tmp_path, ALONE, reports.append)[0] == good
    (said,) = reports
    assert said.startswith("passed over a bad checkpoint:")
    assert str(bad) in said
    assert listing(tmp_path) == before
    assert store.find_newest(tmp_path, ALONE, reports.append, mine=True)[0] == good
    assert "quarantined" in reports[1]
    assert not bad.exists()


def test_a_reader_of_a_store_changes_nothing():
    root = place("memory://readers/short")
    good, bad = save(root, 1), save(root, 2)
    (bad / "rank_00000.safetensors").unlink()
    reports: list[str] = []
    assert store.find_newest(root, ALONE, reports.append)[0] == good
    assert (bad / "manifest.json").is_file()
    root.remove()


def test_what_its_run_deletes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    """The newest vanishes between the listing and the hashing, as when it is pruned."""
    for step in (1, 2):
        save(tmp_path, step)
    true, reports = store.check, []

    def late(folder, world):
        if folder.name.endswith("2") and folder.exists():
            assert not writer.delete([folder])
        return true(folder, world)

    monkeypatch.setattr(store, "check", late)
    for mine in (False, True):
        assert store.find_newest(tmp_path, ALONE, reports.append, mine=mine)[1].step == 1
    assert not reports


def test_a_kill_in_the_middle_of_a_deletion_leaves_a_draft(tmp_path, monkeypatch):
    """Half a checkpoint that still has its name would be taken for a damaged one."""
    folder = save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: os.unlink(Path(path) / "manifest.json"))
    writer.delete([folder])
    assert not store.committed(tmp_path)
    assert len(writer.drafts(tmp_path)) == 1


def test_a_bad_one_that_cannot_be_set_aside_is_one_clear_error(tmp_path, monkeypatch):
    flip(save(tmp_path, 1))

    def refuse(self, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(store.CheckpointError, match=r"setting aside .*Read-only.*Fix:"):
        store.find_newest(tmp_path, ALONE, print, mine=True)
    assert store.find_newest(tmp_path, ALONE, print) is None


def test_a_copy_under_another_number_is_reported_left_alone_and_not_resumed_from(tmp_path):
    low, high = save(tmp_path, 15), save(tmp_path, 20)
    copy = shutil.copytree(low, tmp_path / "step_00000099")
    reports: list[str] = []
    assert store.find_newest(tmp_path, ALONE, reports.append, mine=True)[0] == high
    assert "step 99 with the manifest of step 15" in reports[0]
    assert copy.is_dir()
    with pytest.raises(MisnamedError, match="Fix: move it away"):
        read_manifest(copy)
    save(tmp_path, 25)
    writer.prune(tmp_path, 2, 0, ALONE)
    assert names(tmp_path) == ["step_00000020", "step_00000025", "step_00000099"]
    ours = save(tmp_path, 99)
    assert ours.name.startswith("step_00000099-"), "the name is taken by something else"
    assert store.find_newest(tmp_path, ALONE, reports.append, mine=True)[0] == ours


def test_steps_beyond_eight_digits_are_found_in_order(tmp_path):
    for step in (99_999_999, 100_000_000, 250_000_000, 1_000_000_000):
        save(tmp_path, step)
    assert store.find_newest(tmp_path, ALONE, print)[1].step == 1_000_000_000
    found = store.find_newest(tmp_path, ALONE, print, before=1_000_000_000)
    assert found[1].step == 250_000_000
    writer.prune(tmp_path, 2, 0, ALONE)
    assert names(tmp_path) == ["step_250000000", "step_1000000000"]


def foreign(root: Path) -> Path:
    """Leave what another framework would, under a name like ours, and a folder like a draft."""
    (root / "step_00000007").mkdir(parents=True)
    (root / "step_00000007" / "model.pt").write_bytes(b"theirs")
    (root / "notes.tmp-old").mkdir()
    return root


def test_prune_deletes_only_what_is_ours(tmp_path, capsys):
    foreign(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000002.tmp-12ab")
    assert main(["prune", str(tmp_path), "--keep-last", "2"]) == 0
    left = sorted(path.name for path in tmp_path.iterdir())
    steps = ["step_00000002", "step_00000003", "step_00000007"]
    assert left == ["latest", "notes.tmp-old", *steps]
    writer.prune(tmp_path, 1, 0, ALONE)
    assert (tmp_path / "step_00000007" / "model.pt").read_bytes() == b"theirs"
    assert (tmp_path / "notes.tmp-old").is_dir()
    assert "left alone" in capsys.readouterr().out


def test_prune_in_a_store_leaves_what_it_did_not_name():
    root = place("memory://theirs/short")
    save(root, 1)
    with (root / "step_00000007" / "model.pt").open("wb") as file:
        file.write(b"theirs")
    writer.prune(root, 1, 0, ALONE)
    assert (root / "step_00000007" / "model.pt").is_file()
    root.remove()


def test_prune_by_hand_keeps_the_newest_that_verifies(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "step_00000003")
    assert main(["prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    assert "left alone" in capsys.readouterr().out


@pytest.mark.parametrize("lock", ["owner.json", COMMAND])
def test_prune_is_refused_while_a_run_owns_the_folder(tmp_path, capsys, lock):
    root = tmp_path / "short" / "checkpoints"
    for step in (1, 2):
        save(root, step)
    draft = root / "step_00000003.tmp-ab12"
    draft.mkdir()
    with owned(root.parent, lock):
        assert main(["prune", str(root), "--keep-last", "1"]) == 2
        assert f"owned by process {os.getpid()}" in capsys.readouterr().err
        assert names(root) == ["step_00000001", "step_00000002"]
        assert draft.is_dir()
    assert main(["prune", str(root), "--keep-last", "1"]) == 0
    assert not draft.exists()
    assert not list(root.parent.glob("*.json"))


def test_prune_of_a_folder_that_is_none_makes_none(tmp_path, capsys):
    assert main(["prune", str(tmp_path / "typo"), "--keep-last", "1"]) == 2
    assert not (tmp_path / "typo").exists()


def test_a_run_that_finds_anothers_step_in_its_place_ends(tmp_path):
    """The second run of two that save to one place."""
    save(tmp_path, 5, command="a", seed=1)
    before = listing(tmp_path)
    saver = Saver(tmp_path, "short", TrainerConfig(async_checkpoint=False), ALONE, print)
    with pytest.raises(store.CheckpointError, match=r"another run or command.*Fix: one run"):
        saver.save(5, [("model/a", torch.zeros(3))], {"command": "b", "seed": 2})
    assert listing(tmp_path) == before
