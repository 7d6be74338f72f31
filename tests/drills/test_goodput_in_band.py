"""Kills at exponential times, also while a run starts: the share of useful steps that its own
records state lies in the band of lives that the simulator draws with the kills' rate."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wm_train.plan.scaling.goodput import DAY_S
from wm_train.plan.scaling.records import recorded

ROOT = Path(__file__).resolve().parents[2]
MEAN_S, EVERY, STEPS = 15.0, 20, 800


def start(config: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)


def kill_until_done(config: Path, draws: random.Random) -> int:
    """Restart a run at once when it was killed, until it ends by itself; return the kills."""
    kills, due = 0, time.monotonic() + draws.expovariate(1 / MEAN_S)
    while True:
        run = start(config)
        try:
            assert run.wait(timeout=max(0.0, due - time.monotonic())) == 0
            return kills
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills, due = kills + 1, due + draws.expovariate(1 / MEAN_S)


@pytest.mark.drill
def test_the_share_of_a_killed_run_lies_in_the_simulators_band(worker_config, tmp_path):
    longer = (f"recipe.stages.short.steps={STEPS}", f"trainer.checkpoint_every={EVERY}")
    kills = kill_until_done(worker_config(tmp_path, *longer), random.Random(0))
    found = recorded(tmp_path / "demo" / "short", EVERY)
    assert kills >= 4
    injected = replace(found.failures, per_node_day=DAY_S / MEAN_S)
    drawn = replace(found, failures=injected).drawn()
    print(
        f"{kills} kills, {found.starts} starts, {found.days * DAY_S:.0f} s: useful"
        f" {found.share:.3f}, drawn {drawn.mean:.3f} ({drawn.low:.3f} to {drawn.high:.3f});"
        f" recovery {found.failures.recovery_s:.1f} s, interval {found.saving.interval_s:.1f} s"
    )
    assert drawn.low <= found.share <= drawn.high
    assert found.failures.per_node_day * found.days == pytest.approx(found.starts - 1)
