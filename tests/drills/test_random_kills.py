"""Random kill -9 of one or both workers of a run, also during saves: the curve and the final
weights are those of the undisturbed run.

Twenty kills on two gloo processes by default; `WM_TRAIN_KILLS=200 make drills` for the long
version.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("WM_TRAIN_KILLS", "20"))
STEPS = 3 * KILLS  # each start goes a step further than the one before


def start(config: Path) -> list[subprocess.Popen]:
    """Two ranks, as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen(
            command, cwd=ROOT, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, **quiet
        )
        for r in range(2)
    ]


def steps_done(folder: Path) -> int:
    path = folder / "demo" / "short" / "metrics.jsonl"
    return len(read_steps(path)) if path.exists() else 0


def finish(ranks: list[subprocess.Popen]) -> list[int]:
    return [rank.wait(timeout=300) for rank in ranks]


def supervise(config: Path, folder: Path, kills: int, draws: random.Random) -> int:
    """Restart the run until it ends, killing it `kills` times on the way; returns how many kills
    hit a running worker."""
    done = 0
    while True:
        ranks = start(config)
        if done == kills:
            assert finish(ranks) == [0, 0]
            return done
        before, until = steps_done(folder), time.monotonic() + 180
        while steps_done(folder) <= before and time.monotonic() < until and ranks[0].poll() is None:
            time.sleep(0.02)
        time.sleep(draws.uniform(0.0, 0.6))
        victims = ranks if draws.random() < 0.3 else [draws.choice(ranks)]
        if all(rank.poll() is None for rank in ranks):
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            done += 1
        elif finish(ranks) == [0, 0]:
            return done
        # the survivor ends by itself when its peer's connection closes; a launcher would stop it
        for rank in ranks:
            try:
                rank.wait(timeout=20)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()


@pytest.mark.drill
@pytest.mark.parametrize("model", ["sana_wm", "waypoint"])
def test_random_kills_do_not_change_a_bit(worker_config, pretrained_waypoint, model, tmp_path):
    results, own = {}, pretrained_waypoint if model == "waypoint" else ()
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        longer = (
            *own,
            f"recipe.stages.short.steps={STEPS}",
            "trainer.checkpoint_every=2",
            "parallel.cp=2",
        )
        started = time.monotonic()
        wanted = KILLS if name == "killed" else 0
        hits = supervise(worker_config(folder, *longer), folder, wanted, random.Random(0))
        assert hits == wanted, "the run ended before it was killed so often"
        newest = store.committed(folder / "demo" / "short" / "checkpoints")[-1]
        rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
        curve = [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
        results[name] = (curve, read_manifest(newest).files)
        print(f"{name}: {hits} kills in {time.monotonic() - started:.0f} s")
    assert results["killed"] == results["undisturbed"], (
        "losses, gradient norms, and the hashes of weights, moments and average"
    )
    assert len(results["killed"][0]) == STEPS
