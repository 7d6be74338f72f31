"""Every signal that asks to stop, and an output that is closed, in every phase of a run under every
launcher: all is saved, the exit code is the documented one, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
SLOW = Path(__file__).with_name("slow")
PHASES = ("start", "data", "step", "save", "validation", "sampling")
# how long a phase takes: a run that is asked to stop does not wait for its end
ASKED_S, LEFT_ALONE_S = 60.0, 1.0
# but for a step, a save and one pass of a validation, which are finished
FINISHED_S = 3.0
STEPS = 8


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files, with a short path as Ray puts sockets there."""
    with tempfile.TemporaryDirectory(prefix="d") as folder:
        yield Path(folder)


def processes(mark: str) -> list[str]:
    """Return the command lines of all processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def until(happened: Callable[[], object], seconds: float = 600.0) -> bool:
    limit = time.monotonic() + seconds
    while not happened() and time.monotonic() < limit:
        time.sleep(0.1)
    return bool(happened())


@pytest.mark.drill
@pytest.mark.parametrize("how", ["INT", "TERM", "HUP", "closed output"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("launcher", ["inline", "torchrun", "ray"])
def test_a_stop(
    gameplay: Path, tmp_path: Path, scratch: Path, launcher: str, phase: str, how: str
) -> None:
    workers, mark = 1 if launcher == "inline" else 2, f"WM_TRAIN_DRILL={uuid.uuid4()}"
    seconds = FINISHED_S if phase in ("step", "save", "validation") else ASKED_S
    seconds = LEFT_ALONE_S if how == "closed output" else seconds
    marks = tmp_path / "marks"
    marks.mkdir()
    stage = "recipe.stages.short."
    command = [
        *("wm_train.launch", "experiment=demo", "recipe=demo", "stage=1", "tracker=none"),
        *(f"launcher={launcher}", f"launcher.workers={workers}", "launcher.preflight=false"),
        *(f"data.path={gameplay}", f"out={tmp_path / 'runs'}", "model.depth=1", "model.width=32"),
        *("model.heads=2", f"{stage}frames=41", f"{stage}global_batch=2", f"{stage}steps={STEPS}"),
        *(f"{stage}optimizer.warmup_steps=1", "trainer.checkpoint_every=3"),
        *("trainer.validate_every=4", "trainer.validation_clips=2", "trainer.sample_steps=4"),
        f"trainer.samples={int(phase == 'sampling')}",
    ]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "PYTHONPATH": os.pathsep.join((str(SLOW), str(ROOT))),
        "WM_TRAIN_SLOW": f"{phase}:{seconds}:{marks}",
        "TMPDIR": str(scratch),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        mark.partition("=")[0]: mark.partition("=")[2],
    }
    log = tmp_path / "said"
    with log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE if how == "closed output" else file,
            stderr=file,
        )
    try:
        begun = until(lambda: list(marks.glob("begun_*")) or run.poll() is not None)
        assert begun, log.read_text()
        assert run.poll() is None, log.read_text()
        asked = time.monotonic()
        if run.stdout is not None:
            run.stdout.close()
        else:
            run.send_signal(signal.Signals[f"SIG{how}"])
        code = run.wait(timeout=300)
        took = time.monotonic() - asked
        # the kernel and Ray may take a moment for the last ones
        until(lambda: not processes(mark), 20.0)
        left = processes(mark)
    finally:
        run.kill()
    said = log.read_text()
    rows = tmp_path / "runs" / "demo" / "short" / "metrics.jsonl"
    record = [json.loads(row) for row in rows.read_text().splitlines()] if rows.exists() else []
    steps = [row["step"] for row in record]
    saved = store.committed(rows.parent / "checkpoints")
    print(f"{launcher}, {phase}, {how}: code {code} after {took:.1f} s, saved step {steps[-1:]}")
    assert code == (0 if how == "closed output" else 128 + signal.Signals[f"SIG{how}"]), said
    assert "Traceback" not in said, said
    if how == "closed output":
        assert steps[-1] == STEPS
        assert "the run goes on" in said, said
    elif phase == "validation":
        assert "validation_loss" not in record[-1], "the whole validation was waited for"
    elif phase in ("start", "data", "sampling"):
        assert not list(marks.glob("ended_*")), f"the whole phase was waited for: {said}"
    if steps:
        assert read_manifest(saved[-1]).step == steps[-1], said
    assert bool(steps) == (phase != "start" or how == "closed output"), said
    assert not left
    # torch keeps its cache of compiled code there
    litter = [path for path in scratch.glob("*") if not path.name.startswith("torchinductor_")]
    assert not litter, [str(path) for place in litter for path in place.rglob("*")][:20]
    assert not [path for path in rows.parent.rglob("*") if ".tmp-" in path.name]
    assert not (rows.parent / "owner.json").exists()
