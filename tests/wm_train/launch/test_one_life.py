"""A command never mixes two lives: it refuses to start anew over checkpoints, goes on from what it
made itself, and its workers train with its own config."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch import on_slurm
from wm_train import launch as command
from wm_train.checkpoint import store, writer
from wm_train.checkpoint.manifest import read_manifest
from wm_train.config.curriculum import plan_stage
from wm_train.resilience.run_lock import COMMAND, owned, this_process
from wm_train.tracking.tracker import read_steps
from wm_train.worker import main as work
from wm_train.world import World, leave_world

ROOT = Path(__file__).resolve().parents[3]
ALONE = World(0, 1)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
RECORD = "metrics.jsonl"
TELL = "import json, sys; print('trained with seed', json.load(open(sys.argv[1]))['seed'])"


@pytest.fixture
def train(monkeypatch, data, tmp_path):
    """train(program, *overrides): the demo's first stage on an inline worker that runs
    `program`."""

    def run(program: str, *overrides: str) -> int:
        monkeypatch.setattr(command, "WORKER", ("{python}", "-S", "-c", program, "{config}"))
        line = ["experiment=demo", "recipe=demo", "launcher=inline", f"data.path={data}"]
        return command.main([*line, f"out={tmp_path / 'runs'}", "stage=1", *overrides])

    return run


def save(root, step: int, facts=None) -> Path:
    return writer.save(root, step, "short", {"model/a": torch.zeros(2)}, facts or {}, ALONE)


def state_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in out", "in checkpoint_to"])
def test_starting_anew_over_checkpoints_is_refused_and_touches_nothing(
    train, tmp_path, capsys, elsewhere
):
    folder = tmp_path / "runs" / "demo" / "short"
    to = [f"trainer.checkpoint_to={tmp_path / 'kept'}"] if elsewhere else []
    root = tmp_path / "kept" / "demo" / "short" if elsewhere else folder / "checkpoints"
    save(root, 3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = state_of(tmp_path)
    assert train(TELL, "resume=false", *to) == 2
    shown = capsys.readouterr()
    assert "trained" not in shown.out
    assert f"resume: got false, and step_00000003 in {root}" in shown.err
    assert "Fix: name=<new run>" in shown.err
    assert state_of(tmp_path) == before
    assert train(TELL, "resume=false", "name=other", *to) == 0


def test_starting_anew_over_a_record_without_checkpoints_is_refused(train, tmp_path, capsys):
    """Steps were taken there, and none was saved: their record is all that is left."""
    folder = tmp_path / "runs" / "demo" / "short"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert train(TELL, "resume=false") == 2
    assert f"resume: got false, and metrics.jsonl in {folder}" in capsys.readouterr().err


def test_every_stage_that_would_start_anew_is_named(train, tmp_path, capsys):
    for stage in ("short", "long"):
        save(tmp_path / "runs" / "demo" / stage / "checkpoints", 2)
    assert train(TELL, "resume=false", "stage=all") == 2
    shown = capsys.readouterr().err
    assert "short/checkpoints" in shown
    assert "long/checkpoints" in shown


@pytest.fixture
def in_this_process():
    """Put back what a worker changes in its process: signal handlers, threads, process group."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    threads = torch.get_num_threads()
    yield
    leave_world()
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_restart_of_one_command_goes_on_and_another_command_is_refused(
    worker_config, tmp_path, in_this_process, capsys
):
    """With resume=false: the second start of a command, as after a death, takes what the first one
    has saved; whoever comes with another command finds a stranger's checkpoints."""
    quick = ("recipe.stages.short.steps=2", "trainer.async_checkpoint=false", "resume=false")
    quick += ("trainer.checkpoint_every=1", "launcher.preflight=false")
    config = str(worker_config(tmp_path, *quick))
    assert work(["--config", config, "--command", "first"]) == 0
    root = tmp_path / "demo" / "short" / "checkpoints"
    assert read_manifest(root / "step_00000002").facts["command"] == "first"
    longer = str(worker_config(tmp_path, *quick, "recipe.stages.short.steps=3"))
    assert work(["--config", longer, "--command", "first"]) == 0
    assert "continuing from" in capsys.readouterr().out
    before = state_of(root)
    assert work(["--config", longer, "--command", "second"]) == 2
    shown = capsys.readouterr().err
    assert "resume=false" in shown
    assert "another command" in shown
    assert state_of(root) == before


def test_a_step_of_another_life_is_not_taken_for_ones_own(tmp_path):
    save(tmp_path, 3, {"command": "first"})
    before = state_of(tmp_path)
    with pytest.raises(store.CheckpointError, match=r"step 3 is there already.*another"):
        save(tmp_path, 3, {"command": "second"})
    assert state_of(tmp_path) == before
    assert save(tmp_path, 3, {"command": "first"}).name == "step_00000003"


def test_a_config_that_another_command_has_written_over_is_refused(
    worker_config, tmp_path, capsys, in_this_process
):
    config = worker_config(tmp_path, "seed=111")
    mine = hashlib.sha256(config.read_bytes()).hexdigest()
    worker_config(tmp_path, "seed=222")
    assert work(["--config", str(config), "--sha256", mine]) == 2
    shown = capsys.readouterr().err
    assert "another config" in shown
    assert "Fix:" in shown
    assert not (tmp_path / "demo").exists()


def test_workers_get_the_hash_of_their_own_config_and_one_token_per_command(
    monkeypatch, demo_run, tmp_path
):
    run = demo_run(tmp_path)
    stage = plan_stage(run, "short")
    specs = [command.spec_of(run, stage, [stage]) for _ in range(2)]
    words = [dict(zip(s.command[5::2], s.command[6::2], strict=True)) for s in specs]
    for spec, word in zip(specs, words, strict=True):
        assert word["--sha256"] == hashlib.sha256(spec.config_text.encode()).hexdigest()
    assert words[0]["--command"] != words[1]["--command"]
    judge = command.judge_spec(run, run, stage)
    assert judge.command[: len(command.JUDGE)] == command.JUDGE
    assert hashlib.sha256(judge.config_text.encode()).hexdigest() in judge.command
    script = on_slurm.render({"": specs[0]})
    assert words[0]["--command"] in script, "a requeued job is the same command"
    nodes = demo_run(tmp_path, "launcher.name=torchrun", "launcher.nodes=2")
    both = [command.spec_of(nodes, stage, [stage]).command for _ in range(2)]
    assert both[0] == both[1], "the same command on each machine is one command"


@pytest.mark.parametrize("launcher", ["inline", "slurm"])
def test_a_command_owns_the_folder_before_it_writes_and_while_nothing_runs(
    train, tmp_path, capsys, launcher
):
    """As in the seconds before the workers have theirs, and between two attempts."""
    folder = tmp_path / "runs" / "demo" / "short"
    assert train(TELL, "seed=111") == 0
    before = state_of(folder)
    with owned(folder, COMMAND):
        assert train(TELL, "seed=222", f"launcher={launcher}") == 2
        assert "owned by process" in capsys.readouterr().err
        (folder / COMMAND).unlink()
        assert state_of(folder) == before
    assert not (folder / COMMAND).exists()


def test_a_command_that_was_killed_is_succeeded_at_once(train, tmp_path, capsys):
    """Its locks are left, as in a copy or an archive of the folder of a run that was alive."""
    folder = tmp_path / "runs" / "demo" / "short"
    folder.mkdir(parents=True)
    dead = dataclasses.replace(this_process(), born="1", token="dead")
    for name in (COMMAND, "owner.json"):
        (folder / name).write_text(json.dumps(dataclasses.asdict(dead)))
    assert train(TELL, "seed=3") == 0
    assert "trained with seed 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words"), [(28, "No space left on device"), (30, "Read-only file system")]
)
def test_a_full_or_read_only_disk_at_the_start_is_one_clear_error(
    train, tmp_path, monkeypatch, capsys, code, words
):
    def fail(*_, **__):
        raise OSError(code, words)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write" if code == 28 else "mkdir", fail)
        assert train(TELL) == 2
    said = capsys.readouterr()
    assert "run folder: got" in said.err
    assert words in said.err
    assert "Fix: out=<folder>" in said.err
    assert "trained" not in said.out
    assert not list(tmp_path.glob("runs/demo/short/*"))
    assert train(TELL) == 0


@pytest.mark.full
@pytest.mark.parametrize("how", ["moved", "zipped"])
def test_a_run_goes_on_where_it_was_taken_to(train_here, tmp_path, how):
    steps = "recipe.stages.short.steps="
    train_here(tmp_path / "one", steps + "2", "trainer.async_checkpoint=false")
    train_here(tmp_path / "calm", steps + "4", "trainer.async_checkpoint=false")
    if how == "moved":
        (tmp_path / "one").rename(tmp_path / "two")
    else:
        archive = shutil.make_archive(str(tmp_path / "run"), "zip", tmp_path / "one")
        shutil.unpack_archive(archive, tmp_path / "two")
    train_here(tmp_path / "two", steps + "4", "trainer.async_checkpoint=false")
    rows = [read_steps(tmp_path / out / "demo" / "short" / RECORD) for out in ("two", "calm")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert len(rows[0]) == 4


HELD = """
import json, sys
from pathlib import Path
owner = Path(sys.argv[1]).with_name("command.json")
print("held by", json.loads(owner.read_text())["pid"], "seed", json.load(open(sys.argv[1]))["seed"])
"""


def test_the_folder_is_held_while_workers_run_and_free_afterwards(train, tmp_path, capsys):
    assert train(HELD, "seed=5") == 0
    assert f"held by {os.getpid()} seed 5" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "demo" / "short" / COMMAND).exists()


@pytest.mark.drill
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_a_death_under_resume_false_costs_the_steps_since_the_last_checkpoint(
    gameplay, tmp_path, launcher
):
    steps, out = 120, tmp_path / "runs"
    small = ["model.width=32", "model.depth=1", "recipe.stages.short.frames=9", "tracker=none"]
    small += ["recipe.stages.short.global_batch=2", "trainer.samples=0", "launcher.workers=1"]
    small += [f"recipe.stages.short.steps={steps}", "trainer.checkpoint_every=10"]
    small += [f"launcher={launcher}", "trainer.validation_clips=0", "resume=false"]
    line = ["experiment=demo", "recipe=demo", "stage=1", f"data.path={gameplay}", f"out={out}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "wm_train.launch", *line, *small],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder = out / "demo" / "short"
    until = time.monotonic() + 200
    while len(store.committed(folder / "checkpoints")) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    victim = json.loads((folder / "owner.json").read_text())["pid"]
    subprocess.run(["kill", "-9", str(victim)], check=True)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert "restart 1 of" in said
    again = [int(count) for count in re.findall(r"(\d+) steps done again", said)]
    assert max(again, default=0) <= 20, said
    assert "continuing from" in said
