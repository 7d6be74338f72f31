"""kill -9 of one pool's worker, of the other's, and of the worker of a stage that both train
together: the other pool's steps go on, and every curve and every weight is that of the undisturbed
run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[2]
PARTS = (("high", "short"), ("low", "short"), ("high", "behind"), ("low", "behind"), ("", "long"))
# the low pool has more to do, so that it is still at it when the high one is back
STEPS = {("high", "short"): 40, ("low", "short"): 400, ("", "long"): 18}
STEPS |= {("high", "behind"): 30, ("low", "behind"): 30}


@pytest.fixture
def command(demo_lines, small_moworld) -> Callable[[Path], list[str]]:
    """command(folder): the words that train both pools by themselves and then together."""

    def make(folder: Path) -> list[str]:
        longer = f"recipe.stages.short.steps={STEPS['low', 'short']}"
        longer = f'pools.low.overrides=["{longer}"]'
        steps = (
            f"recipe.stages.short.steps={STEPS['high', 'short']}",
            f"recipe.stages.behind.steps={STEPS['low', 'behind']}",
            f"recipe.stages.long.steps={STEPS['', 'long']}",
        )
        own = (*small_moworld, *steps, longer, "launcher.workers=1", "stage=all")
        words = [word for word in demo_lines(folder, *own) if word != "stage=short"]
        return [sys.executable, "-m", "wm_train.launch", *words]

    return make


def folder_of(root: Path, pool: str, stage: str) -> Path:
    return root / "demo" / pool / stage


def rows(root: Path, pool: str, stage: str) -> list[dict[str, float]]:
    path = folder_of(root, pool, stage) / "metrics.jsonl"
    return read_steps(path) if path.exists() else []


def outcome(root: Path) -> dict[tuple[str, str], tuple]:
    """Return losses, gradient norms and the hashes of the last checkpoint of every part."""
    found = {}
    for part in PARTS:
        curve = [(row["step"], row["loss"], row["grad_norm"]) for row in rows(root, *part)]
        newest = store.committed(folder_of(root, *part) / "checkpoints")[-1]
        found[part] = (curve, read_manifest(newest).files)
    return found


def run_killing(words: list[str], root: Path, victims: list[tuple[str, str]]) -> dict[str, int]:
    """Run a command; kill the worker of each of these parts once, when it has saved a checkpoint.
    Return how many steps the low pool had at the death of the high one, and when that was back."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(words, cwd=ROOT, env=environment, **how)
    said, workers, left, seen = [], dict[str, int](), [*victims], dict[str, int]()
    assert run.stdout is not None
    for line in run.stdout:
        said.append(line)
        if found := re.search(r"(?:(\w+) \| )?process ids rank 0: (\d+)", line):
            workers[found[1] or ""] = int(found[2])
        for pool, stage in [*left]:
            if pool in workers and store.committed(folder_of(root, pool, stage) / "checkpoints"):
                os.kill(workers.pop(pool), signal.SIGKILL)
                left.remove((pool, stage))
                seen |= {"killed": len(rows(root, "low", "short"))} if pool == "high" else {}
        if "high | continuing from" in line:
            seen.setdefault("back", len(rows(root, "low", "short")))
    output = "".join(said)
    assert run.wait(timeout=60) == 0, output
    assert not left, output
    assert output.count("killed by SIGKILL") >= len(victims), output
    for pool in ("high", "low"):  # one process a stage, and one more for each kill
        starts = 2 + sum(pool == own for own, _ in victims)
        assert output.count(f"{pool} | process ids") == starts, output
    return seen


@pytest.mark.drill
def test_a_killed_worker_of_a_pool_or_of_both_together_changes_no_bit(command, tmp_path):
    calm = tmp_path / "calm"
    run_killing(command(calm), calm, [])
    expected = outcome(calm)
    for part, (curve, _) in expected.items():
        assert len(curve) == STEPS[part]
    for victims in ([("high", "short"), ("", "long")], [("low", "behind"), ("", "long")]):
        root = tmp_path / victims[0][0]
        seen = run_killing(command(root), root, victims)
        assert outcome(root) == expected
        if ("high", "short") in victims:
            assert seen["back"] > seen["killed"], "the other pool's steps go on"
            done, back = seen["killed"], seen["back"]
            print(f"the low pool was at step {done} at the death, at step {back} afterwards")
