"""Two thousand steps of two ranks with saves, restarts of nothing: memory, file descriptors and
threads stay flat."""

import time
from pathlib import Path

import pytest

STEPS = 2000
# a nano model on tiny clips, so that it is the loop that is soaked
NANO = (
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "model.softmax_every=0",
    "model.plucker=false",
    "model.camera=false",
    "recipe.stages.short.frames=9",
)


def held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open file descriptors and threads of a process."""
    folder = Path(f"/proc/{pid}")
    return (
        int((folder / "statm").read_text().split()[1]) * 4096,
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
    )


@pytest.mark.drill
def test_two_thousand_steps_leak_nothing(worker_config, tmp_path, start_ranks):
    store = ("tracker.name=mlflow", f"tracker.uri=sqlite:///{tmp_path / 'store.db'}")
    often = ("trainer.checkpoint_every=100", "trainer.sdc_every=20", *store)
    ranks = start_ranks(
        worker_config(tmp_path, *NANO, *often, f"recipe.stages.short.steps={STEPS}"), 2
    )
    samples: list[list[tuple[int, int, int]]] = [[], []]
    started = time.monotonic()
    assert ranks[0].stdout is not None
    for line in ranks[0].stdout:
        step = line.partition('"step": ')[2].partition(",")[0]
        # in the middle between two saves, when no checkpoint thread is at work
        if step.isdigit() and int(step) % 100 == 50 and int(step) >= 350:
            for rank, process in enumerate(ranks):
                samples[rank].append(held(process.pid))
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert all(len(found) == 17 for found in samples), [len(found) for found in samples]
    for rank, found in enumerate(samples):
        early, late = found[:5], found[-5:]
        growth = max(s[0] for s in late) / max(s[0] for s in early) - 1
        # the least of them: a file that is open at the moment of a look is no leak
        descriptors, threads = (min(s[i] for s in late) - min(s[i] for s in early) for i in (1, 2))
        before, after = (max(s[0] for s in part) / 2**20 for part in (early, late))
        print(
            f"rank {rank}: memory {before:.0f} -> {after:.0f} MiB, "
            f"descriptors {min(s[1] for s in early)} -> {min(s[1] for s in late)}, "
            f"threads {min(s[2] for s in early)} -> {min(s[2] for s in late)}"
        )
        assert growth < 0.03
        assert descriptors <= 0
        assert threads <= 0
    print(f"{STEPS} steps in {time.monotonic() - started:.0f} s")
