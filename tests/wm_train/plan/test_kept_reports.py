"""Reports of stages are kept by the settings of their run, and printed again without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wm_train.plan import stage_report
from wm_train.plan.report import main

SHALLOW = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
LINES = ["experiment=demo", "stage=1", *SHALLOW, "--latent", "24x4x4/8", "--memory", "80"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of reports."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wm_train" / "rehearsals"


@pytest.fixture
def planned(monkeypatch):
    """The stages that are planned, not read."""
    found, original = [], stage_report.planned

    def noted(plan, *rest):
        found.append(plan.stage)
        return original(plan, *rest)

    monkeypatch.setattr(stage_report, "planned", noted)
    return found


def test_a_report_is_said_again_without_torch(kept, capsys):
    assert main(LINES) == 0
    first = capsys.readouterr().out
    code = "import sys; from wm_train.plan.report import main; c = main(sys.argv[1:]);"
    code += "assert 'torch' not in sys.modules; sys.exit(c)"
    again = subprocess.run([sys.executable, "-c", code, *LINES], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, first), again.stderr


def test_other_settings_are_planned_anew(kept, planned):
    frames = "recipe.stages.gdn.frames=17"
    for more in ([], [], [frames], ["launcher.workers=1"], [], [frames]):
        assert main([*LINES, *more]) == 0
    assert planned == ["gdn"] * 3
    assert main([*LINES, "--device", "cuda"]) == 0
    assert planned == ["gdn"] * 4


def test_a_kept_report_fits_or_not_in_another_memory(kept, planned, capsys):
    assert main(LINES) == 0
    assert main([*LINES[:-1], "0.0001"]) == 3
    assert main(LINES[:-2]) == 0
    assert planned == ["gdn"]
    shown = capsys.readouterr().out
    assert [shown.count(said) for said in (": fits", "of 0.0001 GiB: DOES NOT FIT")] == [1, 1]


def test_a_device_also_holds_its_runtime(kept, capsys):
    assert main([*LINES[:-1], "2", "--device", "cpu"]) == 0
    assert main([*LINES[:-1], "2", "--device", "cuda"]) == 3
    assert "and 3 of the runtime of 2 GiB: DOES NOT FIT" in capsys.readouterr().out


def test_a_report_is_of_the_machine_that_its_stage_would_find(kept, planned, monkeypatch):
    for visible in ("0", "0", "", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert main(LINES) == 0
    assert planned == ["gdn"] * 2


def test_rates_lengths_and_seeds_are_said_from_a_kept_report(kept, planned, capsys):
    stage = "recipe.stages.gdn"
    words = ("seed=7", f"{stage}.steps=7777", f"{stage}.optimizer.lr=0.0123", "tracker.name=none")
    words += (f"{stage}.optimizer.schedule=constant", f"{stage}.until_loss=0.5")
    for more in ("", *words):
        assert main([*LINES, *more.split()]) == 0
    shown = capsys.readouterr().out
    assert planned == ["gdn"]
    for said in ("7,777 steps", "lr 0.0123", "constant", "held-out loss of 0.5"):
        assert shown.count(said) == 1


def test_a_report_with_days_depends_on_the_steps(kept, planned, capsys):
    words = [*LINES, "--hardware", "h100"]
    steps = "recipe.stages.gdn.steps"
    for more in (f"{steps}=700", f"{steps}=700000", "recipe.stages.gdn.optimizer.lr=0.0123"):
        assert main([*words, more]) == 0
    assert planned == ["gdn"] * 3
    assert main([*words, f"{steps}=700", "recipe.stages.gdn.optimizer.lr=0.0123"]) == 0
    assert planned == ["gdn"] * 3


@pytest.mark.parametrize(
    "damage", ["", "{", "[1, 2]", "{}", '{"lines": ["x"], "device": 1, "runtime": 0, "other": 1}']
)
def test_a_damaged_report_is_made_anew(kept, planned, capsys, damage):
    assert main(LINES) == 0
    (path,) = kept.glob("report-*.json")
    whole = json.loads(path.read_text())
    path.write_text(damage)
    assert main(LINES) == 0
    assert json.loads(path.read_text()) == whole
    assert capsys.readouterr().out.count(whole["lines"][0]) == 2
    assert planned == ["gdn"] * 2


def test_a_plan_by_formula_is_not_kept(kept, planned, monkeypatch, capsys):
    """A line on standard error says why; it is said each time."""
    from wm_train.plan import device_memory
    from wm_train.plan.rehearsal import ReadsOnHost

    def fails(*_):
        raise ReadsOnHost("aten.item")

    monkeypatch.setattr(device_memory, "deep_rehearsals", fails)
    for _ in range(2):
        assert main(LINES) == 0
        assert "memory by formula" in capsys.readouterr().err
    assert planned == ["gdn"] * 2
    assert not [*kept.glob("report-*.json")]


@pytest.mark.full
def test_processes_that_rehearse_end_with_a_plan_that_is_killed(tmp_path):
    words = ["experiment=demo", "stage=all", "--latent", "24x4x4/8"]
    run = subprocess.Popen(
        [sys.executable, "-m", "wm_train.plan", *words],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    listed, deadline = Path(f"/proc/{run.pid}/task/{run.pid}/children"), time.monotonic() + 60
    while len(children := listed.read_text().split()) < 3:  # two rehearse, one tracks resources
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run.kill()
    run.wait()
    while left := [child for child in children if Path(f"/proc/{child}/exe").exists()]:
        assert time.monotonic() < deadline + 60, left
        time.sleep(0.2)
