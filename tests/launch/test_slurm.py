"""Two SLURM nodes on this machine, each with a network, processes and a name of its own: jobs over
both, stages in a chain, saving and queueing again, and the demo under both templates. Needs root,
iproute2 and Debian's slurmctld, slurmd, slurm-client and munge; `make test-slurm` runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from launch import on_slurm
from launch.spec import BatchJob
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def submit(spec, view, slurm: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """submit(program, name, ...) -> id of a job of four workers on two nodes, in a folder of that
    name."""

    def go(program: str, name: str, **batch: object) -> str:
        settings = {"submit": True, "time": "0:10:00", "devices": "gpu:2", **batch}
        job = BatchJob(name, **settings)  # type: ignore[arg-type]
        asked = spec(
            program,
            workers=4,
            nodes=2,
            batch=job,
            directory=tmp_path,
            environment={"OMP_NUM_THREADS": "1"},
        )
        assert on_slurm.run(replace(asked, logs=tmp_path / name / "logs"), view) == 0, (
            view.out.getvalue()
        )
        return (tmp_path / name / "slurm_job_id").read_text().strip()

    return go


def test_a_chain_of_two_stages_over_two_nodes(submit, slurm: ModuleType, tmp_path: Path) -> None:
    program = """
told = " ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME"))
(place / f"{os.environ['SLURM_JOB_NAME']}_{rank}").write_text(told)
"""
    first = submit(program, "one")
    second = submit(program, "two", after=tmp_path / "one" / "slurm_job_id")
    slurm.wait_for(lambda: slurm.completed(second), "the second stage")
    assert slurm.state(first)["JobState"] == "COMPLETED"
    for name in ("one", "two"):
        told = sorted((tmp_path / f"{name}_{rank}").read_text() for rank in range(4))
        assert told == ["4 0 n1", "4 0 n2", "4 1 n1", "4 1 n2"]
    started = {
        name: max(file.stat().st_mtime for file in tmp_path.glob(f"{name}_*"))
        for name in ("one", "two")
    }
    assert started["one"] < started["two"]


def test_a_failed_stage_keeps_the_next_one_from_starting(
    submit, slurm: ModuleType, tmp_path: Path
) -> None:
    first = submit("sys.exit(3)", "bad")
    second = submit("(place / 'ran').touch()", "next", after=tmp_path / "bad" / "slurm_job_id")
    slurm.wait_for(lambda: slurm.state(first)["JobState"] == "FAILED", "the failure")
    slurm.wait_for(
        lambda: slurm.state(second)["Reason"] == "DependencyNeverSatisfied",
        "the dependency to be given up",
    )
    slurm.command("scancel", second)
    assert not (tmp_path / "ran").exists()


def test_before_the_limit_the_workers_save_and_the_job_queues_again(
    submit, slurm: ModuleType, tmp_path: Path
) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: ((place / f"saved_{rank}").touch(), sys.exit(75)))
(place / f"up_{rank}").touch()
time.sleep(120)
"""
    job = submit(program, "long")
    slurm.wait_for(lambda: len(list(tmp_path.glob("up_*"))) == 4, "four workers")
    slurm.command(
        "scancel", "--batch", "--signal=USR1", job
    )  # what --signal=B:USR1@120 sends when the limit is near
    slurm.wait_for(lambda: slurm.queued_again(job), "the job to be queued again")
    assert sorted(file.name for file in tmp_path.glob("saved_*")) == [
        "saved_0",
        "saved_1",
        "saved_2",
        "saved_3",
    ]
    slurm.command("scancel", job)


@pytest.fixture
def submit_array(spec, view, slurm: ModuleType, tmp_path: Path) -> Callable[[str], str]:
    """submit_array(program) -> id of an array of three stages of one worker each."""

    def go(program: str) -> str:
        asked = spec(
            program,
            batch=BatchJob("array", chain="array", submit=True, time="0:10:00"),
            directory=tmp_path,
        )
        stages = [{"": replace(asked, logs=tmp_path / str(stage) / "logs")} for stage in range(3)]
        assert on_slurm.run_stages(stages, view) == 0, view.out.getvalue()
        return (tmp_path / "0" / "slurm_job_id").read_text().strip()

    return go


def test_the_stages_of_an_array_wait_for_each_other_also_while_one_is_queued_again(
    submit_array, slurm: ModuleType, tmp_path: Path
) -> None:
    """The first and the last stage are asked to save. While the first one waits for its second
    half, the next starts too early, and goes back into the queue; the last one has the number of
    the whole array, and takes no other stage with it."""
    program = """
stage = os.environ["SLURM_ARRAY_TASK_ID"]
if stage != "1" and not (place / f"saved_{stage}").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((place / f"saved_{stage}").touch(), sys.exit(75)))
    (place / f"up_{stage}").touch()
    time.sleep(120)
with (place / "order").open("a") as file:
    print(stage, file=file)
"""
    job = submit_array(program)
    first, second, last = (f"{job}_{task}" for task in range(3))

    def save(task: str) -> None:
        up = tmp_path / f"up_{task[-1]}"
        slurm.wait_for(up.exists, f"{task} to begin")
        # scancel cannot: of an array's tasks it delivers the signal, says that it could not, and
        # tries again.
        script = f"job{int(slurm.state(task)['JobId']):05d}/slurm_script"
        os.kill(int(slurm.command("pgrep", "-o", "-f", script)), signal.SIGUSR1)
        slurm.wait_for(partial(slurm.queued_again, task), f"{task} in the queue again")
        assert (tmp_path / f"saved_{task[-1]}").exists()

    def start_now(task: str) -> None:
        """SLURM would wait two minutes; a node refuses a job within a second or two of its end."""
        time.sleep(5)
        subprocess.run(
            ["scontrol", "update", f"JobId={task}", "StartTime=now"], check=False, timeout=30
        )

    save(first)
    slurm.wait_for(partial(slurm.queued_again, second), "the second stage in the queue again")
    assert not (tmp_path / "order").exists()
    for task in (first, second):
        start_now(task)
        slurm.wait_for(partial(slurm.completed, task), task, within_s=200)
    start_now(last)
    save(last)
    start_now(last)
    slurm.wait_for(partial(slurm.completed, last), last, within_s=200)
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2"]
    assert slurm.completed(first)
    assert slurm.completed(second)


def test_a_failed_stage_of_an_array_keeps_the_others_from_running(
    submit_array, slurm: ModuleType, tmp_path: Path
) -> None:
    job = submit_array(
        "(place / os.environ['SLURM_ARRAY_TASK_ID']).joinpath('ran').touch(); sys.exit(3)"
    )
    slurm.wait_for(
        lambda: slurm.state(f"{job}_2")["JobState"] == "FAILED",
        "the last stage to give up",
        within_s=300,
    )
    assert [(tmp_path / str(stage) / "ran").exists() for stage in range(3)] == [True, False, False]


@pytest.fixture
def demo(gameplay: Path, slurm: ModuleType, tmp_path: Path) -> Callable[..., None]:
    """demo(runner, *overrides): submit the demo, smaller, on one worker per node, with its Python
    only on the path that it needs."""

    def go(runner: str, *overrides: str) -> None:
        where = [
            f"data.path={gameplay}",
            f"out={tmp_path / 'runs'}",
            "launcher=slurm",
            f"launcher.slurm.runner={runner}",
        ]
        job = [
            "launcher.nodes=2",
            "launcher.workers=2",
            "launcher.slurm.submit=true",
            "tracker=none",
            "trainer.samples=0",
        ]
        batches = [f"recipe.stages.{stage}.global_batch=2" for stage in ("short", "long")]
        small = ["model.width=64", "recipe.stages.long.frames=41", *batches]
        command_line = [
            sys.executable,
            "-m",
            "wm_train.launch",
            "experiment=demo",
            "recipe=demo",
            *where,
            *job,
            *small,
            *overrides,
        ]
        done = subprocess.run(
            command_line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return go


def logs(tmp_path: Path) -> str:
    return "\n".join(file.read_text() for file in tmp_path.glob("runs/demo/*/logs/slurm_*.log"))


@pytest.mark.parametrize("runner", ["torchrun", "ray"])
def test_the_demos_two_stages_run_over_two_nodes_one_after_the_other(
    demo, runner: str, slurm: ModuleType, tmp_path: Path
) -> None:
    quick = [
        f"recipe.stages.{stage}.{setting}"
        for stage in ("short", "long")
        for setting in ("steps=6", "optimizer.warmup_steps=2")
    ]
    demo(runner, "stage=all", "trainer.validation_clips=0", "launcher.slurm.time=0:10:00", *quick)
    jobs = [
        (tmp_path / "runs" / "demo" / stage / "slurm_job_id").read_text().strip()
        for stage in ("short", "long")
    ]

    def over() -> bool:
        return (
            slurm.state(jobs[1])["JobState"] in slurm.ENDED
            or slurm.state(jobs[0])["JobState"] in slurm.ENDED[1:]
        )

    slurm.wait_for(over, "both stages", within_s=400, tell=partial(logs, tmp_path))
    assert [slurm.state(job)["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"], logs(
        tmp_path
    )
    for stage in ("short", "long"):
        assert [
            row["step"] for row in read_steps(tmp_path / "runs" / "demo" / stage / "metrics.jsonl")
        ] == list(range(1, 7))
    said = logs(tmp_path)
    assert "checked 2 nodes" in said
    assert "weights from" in said
    if runner == "ray":
        assert "2 workers on 2 nodes" in said
        token = (tmp_path / "runs" / "demo" / "short" / "ray_token").read_text()
        assert token not in said + (tmp_path / "runs" / "demo" / "short" / "slurm.sh").read_text()


@pytest.mark.parametrize("runner", ["torchrun", "ray"])
def test_at_the_time_limit_the_demo_saves_queues_again_and_resumes(
    demo, runner: str, slurm: ModuleType, tmp_path: Path
) -> None:
    """SLURM itself sends the signal, 120 s before a limit of four minutes; the job that comes back
    goes on from the checkpoint."""
    limit = ["launcher.slurm.time=0:04:00", "launcher.slurm.signal_s=120"]
    demo(
        runner,
        "stage=1",
        "recipe.stages.short.steps=100000",
        "trainer.checkpoint_every=90000",
        "trainer.validate_every=0",
        *limit,
    )
    stage = tmp_path / "runs" / "demo" / "short"
    job = (stage / "slurm_job_id").read_text().strip()
    slurm.wait_for(lambda: slurm.queued_again(job), "the job to be queued again", within_s=300)
    saved = store.committed(stage / "checkpoints")
    assert len(saved) == 1, logs(tmp_path)
    steps = read_manifest(saved[0]).step
    time.sleep(15)  # nodes refuse a job while they clean up after it; SLURM would wait two minutes
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def goes_on() -> bool:
        over = slurm.state(job)["JobState"] in slurm.ENDED
        return over or len(read_steps(stage / "metrics.jsonl")) >= steps + 5

    tell = partial(logs, tmp_path)
    slurm.wait_for(goes_on, "five more steps", within_s=200, tell=tell)
    slurm.command("scancel", job)
    ended = "the job to end"
    slurm.wait_for(lambda: slurm.state(job)["JobState"] in slurm.ENDED, ended, 100, tell=tell)
    assert slurm.state(job)["JobState"] == "CANCELLED", logs(tmp_path)
    assert f"continuing from {saved[0]}" in logs(tmp_path)
    rows = [row["step"] for row in read_steps(stage / "metrics.jsonl")]
    assert len(rows) >= steps + 5
    assert rows == list(range(1, len(rows) + 1))
