"""One rule for the mesh: launch, plan, parity and trainer accept and refuse the same degrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from parallel.degrees import MeshDegrees
from wm_train import launch as command
from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.parity import __main__ as parity
from wm_train.plan.report import without_data

ROOT = Path(__file__).resolve().parents[3]
ONE_CLIP = ["experiment=demo", "recipe=demo", "stage=1", "recipe.stages.short.global_batch=12"]

# overrides of `parallel` -> (workers, ring x ulysses), or the key of the one mistake; 4 heads
ACCEPTED = {
    "": (4, (1, 1)),
    "cp=4": (4, (1, 4)),
    "ulysses=2 ring=2": (4, (2, 2)),
    "cp=4 ulysses=2 ring=2": (4, (2, 2)),
    "ulysses=2": (4, (1, 2)),
    "ring=2": (4, (2, 1)),
    "cp=4 ring=4": (4, (4, 1)),
    "ulysses=3": (3, (1, 3)),
    "cp=6 ulysses=3": (6, (2, 3)),
    "dp_replicate=2 ulysses=2": (4, (1, 2)),
}
REFUSED = {
    "cp=2 ulysses=2 ring=2": (4, "parallel.ulysses"),
    "cp=4 ulysses=3": (4, "parallel.ulysses"),
    "ulysses=5": (5, "parallel.ulysses"),
    "ulysses=2 ring=0": (4, "parallel.ring"),
    "ring=3": (4, "parallel.cp"),
    "dp_shard=3": (4, "parallel"),
}


def run_of(degrees: str, workers: int, data: Path):
    line = [f"parallel.{word}" for word in degrees.split()]
    return compose([*ONE_CLIP, f"data.path={data}", f"launcher.workers={workers}", *line])


@pytest.mark.parametrize("degrees", ACCEPTED)
def test_what_one_accepts_all_accept_and_resolve_alike(degrees: str, data: Path) -> None:
    workers, sequence = ACCEPTED[degrees]
    run = run_of(degrees, workers, data)
    assert problems_of(run) == []
    assert without_data(run, data_is_here=False) == []
    trainer = MeshDegrees.from_config(run.parallel, workers, run.model.needs().heads)
    assert (trainer.ring, trainer.ulysses) == sequence
    plan = plan_stage(run, "short")
    assert parity.degrees_of(plan, processes=True) == trainer
    virtual = parity.degrees_of(plan, processes=False)
    assert (virtual.ring, virtual.ulysses) == sequence


@pytest.mark.parametrize("degrees", REFUSED)
def test_what_one_refuses_all_refuse_in_the_same_words(degrees: str, data: Path) -> None:
    workers, where = REFUSED[degrees]
    run = run_of(degrees, workers, data)
    (problem,) = problems_of(run)
    assert problem.where == where
    assert without_data(run, data_is_here=False) == [problem]
    for refuse in (
        lambda: MeshDegrees.from_config(run.parallel, workers, run.model.needs().heads),
        lambda: parity.degrees_of(plan_stage(run, "short"), processes=True),
    ):
        with pytest.raises(ValueError) as error:
            refuse()
        assert str(error.value) == str(problem)


def test_the_fix_that_is_offered_is_accepted(data: Path) -> None:
    (problem,) = problems_of(run_of("cp=4 ulysses=2 ring=4", 4, data))
    assert problem.fix == "parallel.cp=null, or parallel.ulysses=4 parallel.ring=1"
    assert problems_of(run_of("cp=4 ulysses=4 ring=1", 4, data)) == []


def test_the_parity_command_of_the_readme_is_a_dry_run_of_launch_too(data: Path, capsys) -> None:
    (line,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "wm_train.parity experiment=demo" in line
    ]
    words = line.split("`")[1].split()[3:]
    assert words[:2] == ["experiment=demo", "recipe=demo"]
    shallow = ["model.depth=2", "model.softmax_every=2"]  # planned in seconds
    assert command.main([*words, *shallow, f"data.path={data}", "--dry-run"]) == 0
    assert "1 data parallel x 4 sequence parallel" in capsys.readouterr().out


def test_the_rule_needs_no_torch() -> None:
    code = "import sys, parallel.degrees, wm_train.checks.mesh; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
