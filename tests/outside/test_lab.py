"""A laboratory's own model, objective, optimizer, sampler and codec, registered by entry points:
everything that ours can do, they can, without a line of ours that knows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.parity.__main__ import main as parity
from wm_train.plan.report import main as plan
from wm_train.tracking.tracker import read_steps

FAULTY = Path(__file__).parents[1] / "drills" / "faulty_worker.py"
WORKER = ("-m", "wm_train.worker", "--config")


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of all steps of a run."""
    rows = read_steps(folder / "lab" / "play" / "metrics.jsonl")
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def saved(folder: Path) -> dict[str, dict[str, object]]:
    """Return size and hash of each file of the newest checkpoint."""
    newest = store.committed(folder / "lab" / "play" / "checkpoints")[-1]
    assert newest.name == "step_00000004"
    return read_manifest(newest).files


@pytest.fixture(scope="module")
def alone(clips, site, command, tmp_path_factory) -> Path:
    """The undisturbed run, started by the launch command."""
    folder = tmp_path_factory.mktemp("alone")
    given = ("--config-dir", site / "lab" / "configs", "experiment=lab", f"data.path={clips}")
    command("wm_train.launch", *given, f"out={folder}", "model.buttons=6")
    return folder


def test_it_trains_is_judged_and_samples(alone):
    losses = [loss for _, loss, _ in curve(alone)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    last = read_steps(alone / "lab" / "play" / "metrics.jsonl")[-1]
    assert last["validation_loss"] > 0
    assert (alone / "lab" / "play" / "samples" / "contact_sheet.png").is_file()


def test_killed_and_resumed_it_is_equal_to_the_bit(alone, lab_run, run_ranks, site, tmp_path):
    config = lab_run(tmp_path, "model.buttons=6", "trainer.samples=0")
    with pytest.raises(AssertionError):
        run_ranks(1, FAULTY, "die", "0", "3", "--", "--config", config, path=[site])
    assert [step for step, *_ in curve(tmp_path)] == [1, 2]
    run_ranks(1, *WORKER, config, path=[site])
    assert curve(tmp_path) == curve(alone)
    assert saved(tmp_path) == saved(alone)


@pytest.mark.parametrize(
    "checkpointing", ["none", pytest.param("selective", marks=pytest.mark.full)]
)
def test_two_processes_of_a_clip_have_the_losses_of_one(
    alone, lab_run, run_ranks, site, tmp_path, checkpointing
):
    given = ("model.buttons=6", "parallel.cp=2", "launcher.workers=2", "launcher.name=torchrun")
    given += (f"model.activation_checkpointing={checkpointing}",)
    run_ranks(2, *WORKER, lab_run(tmp_path, *given), path=[site])
    for mine, one in zip(curve(tmp_path), curve(alone), strict=True):
        assert mine == pytest.approx(one, rel=1e-5, abs=0)


def test_its_memory_is_planned(installed, clips, capsys):
    given = ["--config-dir", str(installed / "lab" / "configs"), "experiment=lab"]
    assert plan([*given, f"data.path={clips}", "model.buttons=6"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1 play: 17 frames = 5 latent frames" in printed
    assert re.search(r"[\d,]+ parameters; GiB per worker: weights", printed)


@pytest.mark.parametrize("size", [1, 2])
def test_its_mesh_is_proven(installed, capsys, size):
    given = ["--config-dir", str(installed / "lab" / "configs"), "experiment=lab", "--worst", "3"]
    small = ["--frames", "5", "--grid", "4x4", "data.path=elsewhere", "model.buttons=3"]
    assert parity([*given, *small, f"parallel.cp={size}"]) == 0
    printed = capsys.readouterr().out
    assert "lab_attention, lab_forcing, 2 clips of 5 latent frames (5, 4 valid)" in printed
    assert f"one device against {size} virtual ranks" in printed
    assert "NOT EXERCISED" not in printed


def test_the_laboratory_imports_no_model_of_ours():
    code = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.rglob("lab/*.py")))
    assert "sana" not in code
    assert len((Path(__file__).parent / "lab" / "model.py").read_text().splitlines()) <= 90
    assert len((Path(__file__).parent / "lab" / "forcing.py").read_text().splitlines()) < 100


def test_choosing_it_imports_no_torch(site):
    code = (
        "import sys; from pathlib import Path; from wm_train.config.compose import compose; "
        f"compose(['experiment=lab', 'data.path=x'], Path({str(site / 'lab' / 'configs')!r})); "
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{site}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr
