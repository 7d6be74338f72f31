"""`experiment=demo recipe=sana_wm stage=1-8`, reduced to a few steps: one command makes a few-step
student. kill -9 inside the data job of stage 6 and inside a cycle of stage 7: the same command goes
on, to the same trajectories, losses and weights as without."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.verify import verify_dataset
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "gdn": 4, "hybrid": 2, "minute_camera": 4, "sft": 2, "chunk_causal": 2, "ode": 4,
    "distill_short": 12, "distill": 6,
}  # fmt: skip
SMALL = ("model.width=32", "model.depth=2", "model.heads=2", "model.softmax_every=2")


def command(data: Path, out: Path) -> list[str]:
    own = ["experiment=demo", "recipe=sana_wm", "stage=1-8", "launcher=inline", "tracker=none"]
    own += [f"data.path={data}", f"out={out}", *SMALL, "trainer.samples=0", "trainer.evaluate=[]"]
    own += ["trainer.validate_every=0", "trainer.validation_clips=2", "trainer.checkpoint_every=1"]
    own += ["recipe.stages.ode.trajectories.shard_clips=1"]
    for stage, steps in STAGES.items():
        at = f"recipe.stages.{stage}."
        own += [f"{at}steps={steps}", f"{at}frames=41", f"{at}optimizer.warmup_steps=0"]
    own += [f"recipe.stages.{name}.distill.gate=warn" for name in ("distill_short", "distill")]
    return [sys.executable, "-m", "wm_train.launch", *own]


def start(words: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def killed_at(words: list[str], log: Path, when) -> None:
    """Start the command and kill it and its workers as soon as `when` says so."""
    process, until = start(words, log), time.monotonic() + 900
    while not when() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, f"it ended before it was killed: {log.read_text()[-2000:]}"
    os.killpg(process.pid, signal.SIGKILL)  # the worker is in its group
    process.wait()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.drill
def test_one_command_makes_a_student_also_when_it_is_killed(gameplay, tmp_path):
    results = {}
    for name in ("whole", "killed"):
        run, log = tmp_path / name / "demo_sana_wm", tmp_path / f"{name}.log"
        words = command(gameplay, tmp_path / name)
        if name == "killed":
            rows = run / "ode" / "trajectories.partial" / "rows"
            killed_at(words, log, lambda rows=rows: len(list(rows.glob("*.json"))) >= 2)
            assert not (run / "ode" / "trajectories").exists()
            metrics = run / "distill_short" / "metrics.jsonl"
            killed_at(words, log, lambda m=metrics: m.exists() and len(read_steps(m)) >= 3)
        assert start(words, log).wait(timeout=900) == 0, log.read_text()[-3000:]
        info, problems, _ = verify_dataset(str(run / "ode" / "trajectories"))
        assert problems == []
        assert info.clips["train"] + info.clips["validation"] == 8
        losses = {
            stage: [row["loss"] for row in read_steps(run / stage / "metrics.jsonl")]
            for stage in STAGES
        }
        assert {stage: len(values) for stage, values in losses.items()} == STAGES
        manifest = read_manifest(store.committed(run / "distill" / "checkpoints")[-1])
        assert any(tensor.startswith("critic/model/") for tensor in manifest.tensors)
        weights = {file: facts["sha256"] for file, facts in manifest.files.items()}
        results[name] = (losses, weights, digests(run / "ode" / "trajectories"))
    assert results["killed"] == results["whole"]
    finished = tmp_path / "whole" / "demo_sana_wm"
    words = [sys.executable, "benchmarks/student_and_teacher.py", str(finished / "distill")]
    words += ["--teacher", str(finished / "sft"), "--clips", "1", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kept = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    judged = subprocess.run(words, check=False, **kept)
    assert "student below teacher" in judged.stdout, judged.stderr[-2000:]
