"""kill -9 of a distilled run at ten random moments, saves included: the curve and the weights of
student and critic are those of the undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[2]
LONG = "recipe.stages.long."
KILLS, STEPS = 10, 30


def start(config: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "wm_train.worker", "--config", str(config)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)


def rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "demo" / "long" / "metrics.jsonl"
    return read_steps(path) if path.exists() else []


@pytest.mark.drill
@pytest.mark.parametrize("model", ["distilled", "distilled_waypoint"])
def test_kills_inside_a_cycle_do_not_change_a_bit(worker_config, model, request, tmp_path):
    distilled = request.getfixturevalue(model)
    settings = (*distilled.stage, f"{LONG}steps={STEPS}", f"{LONG}turns=CCCCCS")
    settings = (*settings, "trainer.keep_last=2")
    first = worker_config(tmp_path / "source", *distilled.source)
    assert start(first).wait(timeout=120) == 0
    weights, losses = {}, {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "source", folder)
        config = worker_config(folder, *settings)
        draws, kills = random.Random(7), KILLS if name == "killed" else 0
        while kills:
            before, worker, until = len(rows(folder)), start(config), time.monotonic() + 120
            # two steps a life or more, so that kills fall on every place of the cycle of six
            while len(rows(folder)) < before + 2 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(draws.uniform(0.0, 0.2))  # in a step or in its save
            assert worker.poll() is None, "the run ended before it was killed"
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            kills -= 1
        assert start(config).wait(timeout=240) == 0
        losses[name] = [row["loss"] for row in rows(folder)]
        newest = store.committed(folder / "demo" / "long" / "checkpoints")[-1]
        manifest = read_manifest(newest)
        assert manifest.step == STEPS
        weights[name] = {file: facts["sha256"] for file, facts in manifest.files.items()}
    assert losses["killed"] == losses["whole"]
    assert len(losses["whole"]) == STEPS
    assert weights["killed"] == weights["whole"]
