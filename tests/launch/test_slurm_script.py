"""The batch script: what it asks for, and that nothing in it can be taken for shell."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch import on_slurm
from launch.spec import BatchJob, LaunchSpec


@pytest.fixture
def asked(spec, tmp_path: Path) -> LaunchSpec:
    job = BatchJob(
        "demo-short",
        account="a team",
        time="1-00:00:00",
        devices="gpu:4",
        container=("apptainer", "exec", "my image.sif"),
    )
    batch = replace(job, setup=("module load things",), options=("--exclusive",))
    return spec(
        "print('hi')",
        workers=8,
        nodes=2,
        cpus_per_worker=3,
        environment={"NOTE": "it's; $HOME"},
        batch=batch,
    )


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
    assert {
        "--signal=B:USR1@120",
        "--requeue",
        "--exclusive",
        "--open-mode=append",
        f"--chdir={asked.directory}",
    } <= directives
    assert not any("partition" in line for line in directives)
    assert "module load things" in lines
    assert any("apptainer exec 'my image.sif'" in line for line in lines)
    assert any("--nnodes=2 --nproc-per-node=4" in line for line in lines)


def test_values_are_quoted_and_the_script_parses(asked: LaunchSpec, tmp_path: Path) -> None:
    script = tmp_path / "slurm.sh"
    script.write_text(on_slurm.render({"": asked}))
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    export = next(
        line for line in script.read_text().splitlines() if line.startswith("export NOTE")
    )
    shown = subprocess.run(
        ["bash", "-c", f'{export}; printf %s "$NOTE"'], capture_output=True, text=True
    ).stdout
    assert shown == "it's; $HOME"


def test_without_submit_the_script_is_only_written(asked: LaunchSpec, view) -> None:
    assert on_slurm.run(asked, view) == 0
    script = asked.logs.parent / "slurm.sh"
    assert script.exists()
    assert f"sbatch {script}" in view.out.getvalue()


def test_a_machine_without_slurm_is_named(
    asked: LaunchSpec, view, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert asked.batch is not None
    assert on_slurm.run(replace(asked, batch=replace(asked.batch, submit=True)), view) == 2
    assert "got no sbatch" in view.out.getvalue()


@pytest.fixture
def array(spec, tmp_path: Path) -> list[dict[str, LaunchSpec]]:
    """Three stages of one array; the second one wants most CPUs."""
    job = BatchJob("demo", chain="array")
    made = [
        replace(spec("", workers=workers, batch=job), logs=tmp_path / f"stage {workers}" / "logs")
        for workers in (1, 3, 2)
    ]
    return [{"": stage} for stage in made]


def test_stages_become_the_tasks_of_one_array(array, view, tmp_path: Path) -> None:
    assert on_slurm.run_stages(array, view) == 0
    script = tmp_path / "stage 1" / "slurm_array.sh"
    directives = {
        line.removeprefix("#SBATCH ")
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH")
    }
    assert {"--array=0-2%1", "--cpus-per-task=3", "--requeue"} <= directives
    assert f"sbatch {script}" in view.out.getvalue()
    for file in (script, *(tmp_path / f"stage {workers}" / "slurm.sh" for workers in (1, 2, 3))):
        assert subprocess.run(["bash", "-n", file], capture_output=True, text=True).stderr == ""
    assert "--array" not in (tmp_path / "stage 3" / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("ended", "queued", "does"),
    [
        ("0", "", "train"),
        ("0", "RUNNING", "train"),
        ("3", "", "fail"),
        (None, "", "fail"),
        (None, "PENDING", "wait"),
    ],
)
def test_a_task_runs_only_after_the_stage_before_ended_well(
    array, view, tmp_path: Path, ended: str | None, queued: str, does: str
) -> None:
    """The script itself, with stand-ins for SLURM's commands."""
    assert on_slurm.run_stages(array, view) == 0
    for name, program in (
        ("squeue", f"echo {queued}"),
        ("scontrol", 'echo "$@" >> asked'),
        ("srun", "touch trained"),
        ("seq", "echo 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{program}\n")
        (tmp_path / name).chmod(0o755)
    if ended is not None:
        (tmp_path / "stage 1" / "slurm_ended_77").write_text(ended + "\n")
    job = {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "78",
        "SLURM_JOB_NODELIST": "n1",
    }
    script = tmp_path / "stage 1" / "slurm_array.sh"
    done = subprocess.run(
        ["bash", script],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **job},
        cwd=tmp_path,
        timeout=30,
        check=False,
    )
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert (done.returncode == 0) is (tmp_path / "trained").exists() is (does == "train")
    assert ("requeue 77_1" in asked) is (does == "wait")
    mark = tmp_path / "stage 3" / "slurm_ended_77"
    assert (mark.read_text().strip() if mark.exists() else None) == {
        "train": "0",
        "fail": "1",
        "wait": None,
    }[does]
    assert (
        "did not end well" in (tmp_path / "stage 3" / "logs" / "slurm_77_1.log").read_text()
    ) is (does == "fail")
