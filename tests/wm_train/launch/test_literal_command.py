"""`python -m wm_train.launch stage=3`, typed as it stands, is the demo's third stage; a folder of a
user's own YAML stands beside ours in launch, plan and parity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wm_train import launch as command
from wm_train.config.compose import DEMO_LINE, compose, is_demo
from wm_train.config.pools import pool_runs
from wm_train.parity import __main__ as parity
from wm_train.plan.report import main as plan
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def beside_demo_data(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the demo's data, as `make train` leaves it."""
    place = tmp_path / "place"
    (place / "data").mkdir(parents=True)
    (place / "data" / "demo").symlink_to(shards)
    monkeypatch.chdir(place)
    return place


def run_launch(place: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "wm_train.launch", *arguments],
        cwd=place,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_a_command_that_chooses_nothing_is_the_demo() -> None:
    run = compose(["stage=3", "model.width=64", "recipe.stages.gdn.steps=7"])
    assert (run.name, run.recipe.name, run.data.path) == ("demo_sana_wm", "sana_wm", "data/demo")
    assert (run.model.width, run.recipe.stages["gdn"].steps) == (64, 7)
    assert run.recipe.stages["minute_camera"].frames == 81
    assert run == compose(
        ["experiment=demo", "stage=3", "model.width=64", "recipe.stages.gdn.steps=7"]
    )


@pytest.mark.parametrize(
    "override",
    ["experiment=sana_wm", "recipe=demo", "model=small", "data.path=/x", "++data.path=/x"],
)
def test_a_command_that_chooses_one_of_four_is_not_the_demo(override: str) -> None:
    assert not is_demo(["stage=3", override])
    where = [] if "data.path" in override else ["data.path=/x"]
    run = compose(["stage=1", override, *where])
    assert run.data.path == "/x"
    if "recipe" not in override:
        assert (run.name, run.recipe.stages["gdn"].steps) == ("sana_wm", 30000)


SHALLOW = ["model.depth=2", "model.softmax_every=2"]  # planned in seconds


def test_the_short_demo_keeps_its_name_and_folder() -> None:
    run = compose(["experiment=demo", "recipe=demo"])
    assert (run.name, list(run.recipe.stages)) == ("demo", ["short", "long"])
    pools = compose(["experiment=demo_pools"])
    assert (pools.name, list(pools.recipe.stages)) == ("demo_pools", ["short", "long"])


def test_a_pool_of_the_demo_is_the_demo_whatever_it_overrides() -> None:
    line = ["stage=1-5", "pools.high.sigma_min=0.5", 'pools.high.overrides=["model=sana_wm_nano"]']
    (high,) = pool_runs(compose(line), line).values()
    assert (high.model.width, high.data.path) == (32, "data/demo")


def test_right_after_make_train_one_report_names_the_stages_to_train_first(
    beside_demo_data: Path,
) -> None:
    done = run_launch(beside_demo_data, "stage=3")
    assert (done.returncode, done.stdout) == (2, f"{DEMO_LINE}\n")
    assert done.stderr.splitlines()[0].startswith("1 problem in")
    assert done.stderr.endswith(" python -m wm_train.launch stage=1-2\n")
    assert not (beside_demo_data / "runs").exists()


@pytest.mark.parametrize(
    ("trained", "stage", "named"),
    [
        ([], "2", "stage=1"),
        ([], "3-4", "stage=1-2"),
        (["gdn"], "3", "stage=2"),
        (["gdn", "hybrid"], "5", "stage=3-4"),
    ],
)
def test_the_report_repeats_what_was_typed_and_names_what_is_missing(
    beside_demo_data: Path, capsys: pytest.CaptureFixture[str], trained, stage: str, named: str
) -> None:
    for name in trained:
        folder = beside_demo_data / "runs" / "demo_sana_wm" / name / "checkpoints"
        (folder / "step_00000010").mkdir(parents=True)
    typed = ["launcher=inline", f"stage={stage}", "launcher.workers=1", "--dry-run"]
    assert command.main(typed) == 2
    said = capsys.readouterr().err
    assert said.endswith(f" python -m wm_train.launch launcher=inline launcher.workers=1 {named}\n")


def test_a_dry_run_says_first_that_it_is_the_demo(beside_demo_data: Path) -> None:
    done = run_launch(beside_demo_data, "stage=1-2", "--dry-run", *SHALLOW)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == DEMO_LINE
    assert [line.split(",")[0] for line in lines if line.startswith("# stage")] == [
        "# stage gdn",
        "# stage hybrid",
    ]
    assert "stage 2 hybrid: 41 frames = 6 latent frames, 30 steps of 4 clips" in lines


def test_plan_and_parity_take_the_demo_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["stage=3", "--latent", "24x7x10/8", *SHALLOW]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == DEMO_LINE
    assert said[1].startswith("stage 3 minute_camera: 81 frames")
    small = ["model.width=32", "model.heads=4", "model.depth=2", "model.softmax_every=2"]
    assert parity.main(["stage=3", *small, "--frames", "3", "--grid", "2x2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == DEMO_LINE
    assert "sana_wm, flow_matching" in said[1]


MINE = {
    "model/mine.yaml": "name: sana_wm\ndepth: 2\nwidth: 32\nheads: 4\nsoftmax_every: 2\n",
    "recipe/mine.yaml": """\
name: mine
stages:
  only: {index: 1, frames: 17, steps: 7, global_batch: 2, optimizer: {warmup_steps: 1}}
""",
    "experiment/mine.yaml": """\
# @package _global_
defaults:
  - override /recipe: mine
  - override /model: mine

model: {latent_channels: 24}
data: {path: data/demo}
""",
}


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """The option that names a folder of a user's own experiments, recipes and models."""
    for name, text in MINE.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    return ["--config-dir", str(tmp_path / "mine")]


CHOICES = {
    "experiment": ["experiment=mine"],
    "recipe and model": ["recipe=mine", "model=mine", "model.latent_channels=24"],
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("program", ["launch", "plan", "parity"])
def test_a_folder_of_ones_own_stands_beside_ours(
    program: str, choice: str, mine, beside_demo_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [*mine, *CHOICES[choice], "data.path=data/demo"]
    mains = {
        "launch": lambda: command.main([*typed, "--dry-run"]),
        "plan": lambda: plan(typed),
        "parity": lambda: parity.main([*typed, "data.path=elsewhere", "--grid", "2x2"]),
    }
    assert mains[program]() == 0
    said = capsys.readouterr().out
    shown = "mine: sana_wm, flow_matching" if program == "parity" else "stage 1 only: 17 frames"
    assert shown in said
    assert DEMO_LINE not in said


@pytest.mark.full
def test_the_third_stage_of_the_demo_trains_as_typed(gameplay: Path, tmp_path: Path) -> None:
    """Shortened, on clips of 41 frames, in one process: stages 1 and 2, then `stage=3`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(gameplay)
    quick = ["launcher=inline", "launcher.workers=1", "model.width=64", "tracker=none"]
    quick += ["trainer.samples=0", "trainer.validation_clips=0"]
    quick += ["recipe.stages.minute_camera.frames=41"]
    for stage in ("gdn", "hybrid", "minute_camera"):
        quick += [
            f"recipe.stages.{stage}.steps=3",
            f"recipe.stages.{stage}.optimizer.warmup_steps=1",
        ]
    refused = run_launch(tmp_path, *quick, "stage=3")
    assert refused.returncode == 2
    first = run_launch(tmp_path, *quick, "stage=1-2", timeout=240)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0] == DEMO_LINE
    assert "stage=3" in first.stdout.splitlines()[-1]
    third = run_launch(tmp_path, *quick, "stage=3", timeout=240)
    assert third.returncode == 0, third.stderr
    folder = tmp_path / "runs" / "demo_sana_wm" / "minute_camera"
    assert [row["step"] for row in read_steps(folder / "metrics.jsonl")] == [1, 2, 3]
