"""kill -9 at every step of the save protocol: what is found afterwards is always a whole
checkpoint, never a mix."""

import os
import signal
from pathlib import Path

import pytest
import torch

from wm_train.checkpoint import store, writer
from wm_train.world import World

ALONE = World(0, 1)
# a save makes a folder, writes a file, writes the manifest, renames, and points to it: at least
# these
TOUCHES = 5


def state(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/a": torch.full((64, 64), float(step)),
        "optimizer/a/step": torch.tensor(float(step)),
    }


def save_and_die(root: Path, at_call: int, after: bool) -> bool:
    """Save step 2 in a child that is killed before or after its `at_call`-th touch of the disk;
    whether the child got that far."""
    child = os.fork()
    if child == 0:
        calls = 0

        def lethal(true):
            def touch(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == at_call and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = true(*arguments, **options)
                if calls == at_call and after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return touch

        for owner, name in (
            (writer, "write_tensors"),
            (writer, "write_text"),
            (writer, "sync_folder"),
        ):
            setattr(owner, name, lethal(getattr(owner, name)))
        Path.mkdir = lethal(Path.mkdir)  # type: ignore[method-assign]
        Path.rename = lethal(Path.rename)  # type: ignore[method-assign]
        writer.save(root, 2, "short", state(2), {}, ALONE)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, after):
    reached, found_steps = 0, []
    while True:
        root = tmp_path / str(reached)
        writer.save(root, 1, "short", state(1), {}, ALONE)
        if not save_and_die(root, reached + 1, after):
            break
        reached += 1
        reports: list[str] = []
        found = store.find_newest(root, ALONE, reports.append, mine=True)
        assert found is not None
        assert not reports, "an unfinished save must not even look like a checkpoint"
        targets = {name: torch.empty_like(tensor) for name, tensor in state(0).items()}
        store.load(*found, targets)
        step = found[1].step
        assert all(torch.equal(targets[name], tensor) for name, tensor in state(step).items())
        found_steps.append(step)
        writer.prune(root, 2, 0, ALONE)
        assert not writer.drafts(root)
        assert writer.save(root, 2, "short", state(2), {}, ALONE).is_dir(), (
            "the next save must work"
        )
    assert reached >= TOUCHES
    assert set(found_steps) == {1, 2}, (
        "some kills come before the rename that publishes, some after"
    )
    assert found_steps == sorted(found_steps)
    print(
        f"{reached} kills {'after' if after else 'before'} a touch of the disk, checkpoints found:"
        f" {found_steps}"
    )
