"""The launch command with real training: a killed worker changes nothing, and a job on a cluster
ends as its command does."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.inline import free_port
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

ROOT = Path(__file__).resolve().parents[3]
STEPS = 30  # as `arguments` has them


def losses(folder: Path, steps: int = STEPS) -> list[float]:
    rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    return [row["loss"] for row in rows]


def outcome(folder: Path) -> tuple[list[tuple[float, float]], dict]:
    """Losses and gradient norms of all steps, and the hashes of the final weights, moments and
    average."""
    assert losses(folder)
    rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
    last = store.committed(folder / "demo" / "short" / "checkpoints")[-1]
    return [(row["loss"], row["grad_norm"]) for row in rows], read_manifest(last).files


@pytest.mark.drill
def test_killing_a_worker_changes_nothing(arguments, environment, tmp_path: Path) -> None:
    """kill -9 of rank 1 after the first checkpoint: restarted by itself, and the curve is that of
    the undisturbed run, bit for bit."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    subprocess.run(
        [sys.executable, "-m", *arguments(calm)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        timeout=240,
    )
    run = subprocess.Popen(
        [sys.executable, "-m", *arguments(disturbed)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, killed = [], False
    assert run.stdout is not None
    victim = 0
    for line in run.stdout:
        said.append(line)
        if found := re.search(r"process ids .*rank 1: (\d+)", line):
            victim = victim or int(found[1])
        if not killed and store.committed(disturbed / "demo" / "short" / "checkpoints"):
            os.kill(victim, signal.SIGKILL)
            killed = True
    assert run.wait(timeout=60) == 0, "".join(said)
    assert "rank 1 died: killed by SIGKILL" in "".join(said)
    assert "goodput" in "".join(said)
    assert outcome(disturbed) == outcome(calm)


def worlds_of(checkpoints: Path) -> list[int]:
    """Return how many workers each checkpoint was written by, oldest first."""
    return [read_manifest(folder).facts["world"] for folder in store.committed(checkpoints)]


@pytest.mark.full
def test_after_a_lost_node_a_run_shrinks_grows_again_and_has_the_losses_of_the_undisturbed_one(
    arguments, environment, token, tmp_path: Path
) -> None:
    """Two simulated nodes of one CPU each. One goes away, the run goes on on the other; it comes
    back, and the run grows."""
    calm, disturbed, steps = tmp_path / "calm", tmp_path / "disturbed", 60
    longer = [
        f"recipe.stages.short.steps={steps}",
        "recipe.stages.short.global_batch=16",
        "trainer.keep_last=100",
    ]
    # At the demo's own rate the last bits, in which a world of another size differs, grew a
    # thousandfold in 40 steps.
    longer += ["recipe.stages.short.optimizer.lr=4e-4"]
    command = [sys.executable, "-m", *arguments(calm, *longer)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    from ray.cluster_utils import Cluster

    checkpoints = disturbed / "demo" / "short" / "checkpoints"
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        second = nodes.add_node(num_cpus=1)
        elastic = [
            "launcher.min_workers=1",
            "launcher.place_s=5",
            "launcher.grow_s=3",
            f"launcher.address={nodes.address}",
        ]
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(
                [sys.executable, "-m", *arguments(disturbed, *longer, *elastic)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

            def wait(happened: Callable[[], object], what: str) -> None:
                until = time.monotonic() + 200
                while not happened():
                    assert run.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < until, (
                        f"waited for {what}: " + (tmp_path / "log").read_text()
                    )
                    time.sleep(0.05)

            wait(lambda: store.committed(checkpoints), "the first checkpoint")
            nodes.remove_node(second)
            wait(lambda: "going on with 1" in (tmp_path / "log").read_text(), "the smaller world")
            wait(lambda: 1 in worlds_of(checkpoints), "a checkpoint of the smaller world")
            nodes.add_node(num_cpus=1)
            assert run.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    finally:
        nodes.shutdown()
    said = (tmp_path / "log").read_text()
    assert said.count("2 workers on 2 nodes") == 2
    assert "room for 1 of 2 workers" in said
    assert "room for 2 workers: growing, from the checkpoint just made" in said
    assert [world for world, _ in itertools.groupby(worlds_of(checkpoints))] == [2, 1, 2]
    assert losses(disturbed, steps) == pytest.approx(losses(calm, steps), rel=1e-6, abs=0)


@pytest.mark.full
@pytest.mark.parametrize("workers", [2, 4])
def test_torchrun_gives_the_losses_of_ray_bit_for_bit(
    arguments, environment, tmp_path: Path, workers: int
) -> None:
    for launcher in ("ray", "torchrun"):
        size = [
            f"launcher={launcher}",
            f"launcher.workers={workers}",
            "recipe.stages.short.global_batch=4",
            "parallel.cp=2",
        ]
        command = [sys.executable, "-m", *arguments(tmp_path / launcher, *size)]
        subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400
        )
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "ray")


@pytest.mark.full
def test_a_killed_worker_of_one_pool_costs_the_other_nothing(
    arguments, environment, tmp_path: Path
) -> None:
    """Two experts under one driver; `kill -9` of the low one's worker. The high one's steps go on
    meanwhile, the low one resumes, both end, they are judged together, and one MLflow run shows
    both curves."""
    from mlflow import MlflowClient

    line = [
        argument
        for argument in arguments(tmp_path)
        if not argument.startswith(("experiment=", "tracker="))
    ]
    longer = [
        "experiment=demo_pools",
        "recipe.stages.short.steps=80",
        "trainer.samples=1",
        "trainer.sample_steps=4",
        "name=demo",
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", *line, *longer],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    victim, died, back, steps = 0, 0, 0, {}
    assert run.stdout is not None
    for text in run.stdout:
        said.append(text)
        if found := re.search(r"low \| process ids rank 0: (\d+)", text):
            victim = victim or int(found[1])
        folder = tmp_path / "demo" / "low" / "short" / "checkpoints"
        if victim and not died and store.committed(folder):
            os.kill(victim, signal.SIGKILL)
            died = 1
            steps["killed"] = rows(tmp_path / "demo" / "high" / "short")
        if "low | continuing from" in text:
            back = 1
            steps["back"] = rows(tmp_path / "demo" / "high" / "short")
    assert run.wait(timeout=60) == 0, "".join(said)
    output = "".join(said)
    assert died
    assert back, output
    assert "low | rank 0 died: killed by SIGKILL" in output
    assert output.count("high | process ids") == 1, "it keeps its process"
    assert steps["back"] > steps["killed"], "its steps go on"
    assert "joint validation_loss" in output
    assert (tmp_path / "demo" / "joint" / "short" / "samples" / "contact_sheet.png").exists()
    assert (
        rows(tmp_path / "demo" / "high" / "short")
        == rows(tmp_path / "demo" / "low" / "short")
        == 80
    )
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    parent = client.get_run(json.loads((tmp_path / "demo" / "mlflow.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED"
    for pool in ("high", "low"):
        assert {
            m.step for m in client.get_metric_history(parent.info.run_id, f"{pool}/short/loss")
        } == set(range(1, 81))


def rows(folder: Path) -> int:
    return len(read_steps(folder / "metrics.jsonl"))


@pytest.fixture
def head(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of the job server of a Ray head on loopback, and the environment to talk to it
    with."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, agent = (free_port("127.0.0.1") for _ in range(3))
    ray = Path(sys.executable).with_name("ray")
    ports = [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
    ]
    places = [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            [
                ray,
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                "--disable-usage-stats",
                *places,
                *ports,
            ],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for_port(dashboard)
            yield f"http://127.0.0.1:{dashboard}", environment
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_for_port(port: int) -> None:
    until = time.monotonic() + 90
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < until, "the head did not start"
            time.sleep(0.2)


@pytest.mark.full
def test_a_job_ends_as_its_command_does(arguments, head, tmp_path: Path) -> None:
    address, environment = head
    ray = Path(sys.executable).with_name("ray")

    def submit(*command: str) -> subprocess.CompletedProcess[str]:
        call = [ray, "job", "submit", "--address", address, "--", sys.executable, "-m", *command]
        for _ in range(20):  # the job agent comes up after the server
            done = subprocess.run(
                call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
            )
            if "No available agent" not in done.stdout + done.stderr:
                return done
            time.sleep(2)
        raise AssertionError("no job agent")

    good = submit(*arguments(tmp_path / "runs"))
    assert good.returncode == 0, good.stdout + good.stderr
    assert "joined the Ray cluster" in good.stdout
    assert f"step {STEPS}/{STEPS}" in good.stdout, "rank 0's log is streamed"
    assert "succeeded" in good.stdout + good.stderr
    assert len(losses(tmp_path / "runs")) == STEPS
    bad = submit(*arguments(tmp_path / "bad", "parallel.cp=9"))
    assert bad.returncode != 0
    assert "parallel.cp: got 9" in bad.stdout + bad.stderr
    assert not (tmp_path / "bad").exists()
