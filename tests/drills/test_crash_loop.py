"""A run that dies at every start ends by its budget of restarts, with growing pauses; one that dies
twice at one step ends at once."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.drill
@pytest.mark.parametrize(("restarts", "poisoned"), [(2, False), (5, True)])
def test_a_crash_loop_ends(gameplay, tmp_path, restarts, poisoned):
    """Real workers under torchrun: either they cannot write their record, or step 3 has a loss that
    `stop` refuses every time."""
    small = [
        "model.width=32",
        "model.depth=1",
        "recipe.stages.short.frames=9",
        "recipe.stages.short.global_batch=2",
        "trainer.samples=0",
    ]
    stage = tmp_path / "demo" / "short"
    if poisoned:
        small += [
            "recipe.stages.short.optimizer.lr=10",
            "recipe.stages.short.optimizer.clip_norm=1e30",
            "trainer.spike_factor=1.0001",
            "recipe.stages.short.optimizer.warmup_steps=0",
            "trainer.checkpoint_every=5",
        ]
    else:
        (stage / "metrics.jsonl").mkdir(parents=True)
    where = [f"data.path={gameplay}", f"out={tmp_path}", "tracker=none", "launcher=torchrun"]
    command = ["wm_train.launch", "experiment=demo", "recipe=demo", "stage=1", *where]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command, f"launcher.max_restarts={restarts}", *small],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    said = done.stdout + done.stderr
    attempts = re.findall(r"restart (\d+) of \d+ in (\d+) s", said)
    assert done.returncode == 1, said
    if poisoned:
        assert re.search(r"two deaths at step \d+: trying again would not help", said), said
        assert len(attempts) == 1
    else:
        assert f"given up after {restarts} restarts" in said, said
        assert attempts == [("1", "1"), ("2", "2")]
    print(
        f"{len(attempts) + 1} attempts in {time.monotonic() - started:.0f} s, exit code"
        f" {done.returncode}"
    )
