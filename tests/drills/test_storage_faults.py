"""Full disk, read-only folder, EIO on fsync during a save: the last good checkpoint is untouched,
nothing partial counts as valid, and the next save works once there is room. On a small file system
of its own where one can be mounted, else at the system calls."""

import errno
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import torch

from wm_train.checkpoint import store, writer
from wm_train.checkpoint.manifest import CheckpointError
from wm_train.tracking.tracker import read_steps
from wm_train.world import World

ALONE = World(0, 1)


def state(step: int, size: int = 40_000) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((size,), float(step)),
        "optimizer/a/step": torch.tensor(float(step)),
    }


def save(root: Path, step: int, size: int = 40_000) -> Path:
    return writer.save(root, step, "short", state(step, size), {}, ALONE)


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def newest(root: Path) -> tuple[int, list[str]]:
    reports: list[str] = []
    found = store.find_newest(root, ALONE, reports.append, mine=True)
    assert found is not None
    targets = {name: torch.empty_like(tensor) for name, tensor in state(0).items()}
    store.load(*found, targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in state(found[1].step).items())
    return found[1].step, reports


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk):
    good = save(small_disk / "checkpoints", 1)
    before = digest(good)
    (small_disk / "ballast").write_bytes(b"x" * 750_000)
    for step in (2, 3):
        with pytest.raises(
            CheckpointError,
            match=r"No space left on device.*Earlier checkpoints are untouched. Fix: make room",
        ):
            save(small_disk / "checkpoints", step)
        assert digest(good) == before
        assert newest(small_disk / "checkpoints") == (1, [])
        assert not writer.drafts(small_disk / "checkpoints"), (
            "what was half written gives its room back"
        )
    (small_disk / "ballast").unlink()
    save(small_disk / "checkpoints", 4)
    assert newest(small_disk / "checkpoints") == (4, [])


def test_a_read_only_folder(small_disk):
    good = save(small_disk / "checkpoints", 1)
    before = digest(good)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*untouched"):
        save(small_disk / "checkpoints", 2)
    assert digest(good) == before
    assert newest(small_disk / "checkpoints") == (1, [])
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    save(small_disk / "checkpoints", 3)
    assert newest(small_disk / "checkpoints") == (3, [])


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get
)
def test_every_call_of_a_save_may_fail(tmp_path, monkeypatch, code):
    """One failing call after the other: each of fsync, write, mkdir, open and rename that a save
    makes."""
    reached = {"fsync": 0, "rename": 0, "mkdir": 0, "open": 0}
    for name, owner in (("fsync", os), ("rename", Path), ("mkdir", Path), ("open", Path)):
        true = getattr(owner, name)
        at = 0
        while True:
            root = tmp_path / f"{name}_{at}"
            good = save(root, 1)
            before, calls = digest(good), [0]

            def failing(*arguments, true=true, at=at, calls=calls, **options):
                calls[0] += 1
                if calls[0] == at + 1:
                    raise OSError(code, os.strerror(code))
                return true(*arguments, **options)

            error = None
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                try:
                    save(root, 2)
                except CheckpointError as raised:
                    error = raised
            assert error is None or "Fix:" in str(error)
            assert digest(good) == before
            step, reports = newest(root)
            assert not reports
            assert step in ((1, 2) if error else (2,)), (
                "after the rename it is whole, though the pointer to it may not be written"
            )
            save(root, 3)
            assert newest(root) == (3, [])
            if calls[0] <= at:
                break
            at += 1
            reached[name] += 1
    assert all(count >= 1 for count in reached.values()), reached
    print({errno.errorcode[code]: reached})


@pytest.mark.drill
def test_a_run_on_a_full_disk_goes_on_and_saves_when_there_is_room(
    small_disk, worker_config, start_ranks
):
    """Two ranks, a checkpoint every second step; the disk is full from step 4 to step 10."""
    steps = 20
    saving = (
        "trainer.checkpoint_every=2",
        "trainer.keep_last=1",
        "model.depth=1",
        "model.width=32",
    )
    config = worker_config(small_disk, f"recipe.stages.short.steps={steps}", *saving)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ranks = start_ranks(config, 2)
    said, ballast = [], small_disk / "ballast"
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        said.append(line)
        if '"step": 4,' in line:
            free = os.statvfs(small_disk)
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * min(65536, free.f_bsize * 16))
                except OSError:
                    pass
        if '"step": 10,' in line:
            ballast.unlink()
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0], "".join(said)
    output = "".join(said)
    assert "No space left on device" in output
    root = small_disk / "demo" / "short"
    assert [folder.name for folder in store.committed(root / "checkpoints")] == [
        f"step_{steps:08d}"
    ]
    assert [row["step"] for row in read_steps(root / "metrics.jsonl")] == list(
        range(1, steps + 1)
    ), "no line of the record is lost"
    print(
        f"{output.count('No space left')} refusals, last checkpoint at step {steps}, {steps} lines"
        " of record"
    )
