"""The batch script: what it asks for, and that nothing in it can be taken for shell."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch import on_slurm
from launch.spec import BatchJob, LaunchSpec


@pytest.fixture
def asked(spec, tmp_path: Path) -> LaunchSpec:
    job = BatchJob("demo-short", account="a team", time="1-00:00:00", devices="gpu:4", container=("apptainer", "exec", "my image.sif"))
    batch = replace(job, setup=("module load things",), options=("--exclusive",))
    return spec("print('hi')", workers=8, nodes=2, cpus_per_worker=3, environment={"NOTE": "it's; $HOME"}, batch=batch)


def test_what_the_script_asks_for(asked: LaunchSpec, tmp_path: Path) -> None:
    lines = on_slurm.render({"": asked}).splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=12",
        "--gres=gpu:4",
        "--time=1-00:00:00",
        "--account='a team'",
    } <= directives
    assert {"--signal=B:USR1@120", "--requeue", "--exclusive", "--open-mode=append", f"--chdir={asked.directory}"} <= directives
    assert not any("partition" in line for line in directives)
    assert "module load things" in lines
    assert any("apptainer exec 'my image.sif'" in line for line in lines)
    assert any("--nnodes=2 --nproc-per-node=4" in line for line in lines)


def test_values_are_quoted_and_the_script_parses(asked: LaunchSpec, tmp_path: Path) -> None:
    script = tmp_path / "slurm.sh"
    script.write_text(on_slurm.render({"": asked}))
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    export = next(line for line in script.read_text().splitlines() if line.startswith("export NOTE"))
    shown = subprocess.run(["bash", "-c", f'{export}; printf %s "$NOTE"'], capture_output=True, text=True).stdout
    assert shown == "it's; $HOME"


def test_without_submit_the_script_is_only_written(asked: LaunchSpec, view) -> None:
    assert on_slurm.run(asked, view) == 0
    script = asked.logs.parent / "slurm.sh"
    assert script.exists()
    assert f"sbatch {script}" in view.out.getvalue()


def test_a_machine_without_slurm_is_named(asked: LaunchSpec, view, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert asked.batch is not None
    assert on_slurm.run(replace(asked, batch=replace(asked.batch, submit=True)), view) == 2
    assert "got no sbatch" in view.out.getvalue()
