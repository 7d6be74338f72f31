"""The look at every node: each fault is found and its node named, and sound nodes pass quickly.
Faults are made on real processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from wm_train.checks.nodes import Facts, problems_of, slow_nodes

SOUND = Facts(node="n1", devices=8, free_bytes=70 << 30, folder="", data="", fingerprint="abc")
FAULTS = {
    "a lost device": ({"devices": 7}, "got 7 devices, expected 8"),
    "a full device": ({"free_bytes": 20 << 30}, "got 20.0 GiB of free memory, expected about 70.0"),
    "a clock ahead": ({"late_s": 3.5}, "got a clock 3.5 s ahead of rank 0's"),
    "a clock behind": ({"late_s": -90.0}, "got a clock 90.0 s behind rank 0's"),
    "a folder of its own": (
        {"folder": "got a folder without rank 0's file"},
        "got a folder without rank 0's file",
    ),
    "no data": (
        {"data": "data.path: got /x, which does not exist", "fingerprint": ""},
        "which does not exist",
    ),
    "no DeepSpeed": (
        {"sharding": "sharding: got zero3 (No module named 'deepspeed')"},
        "got zero3 (No module named",
    ),
    "other data": ({"fingerprint": "xyz"}, "got another data set at that path"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_once_per_node_and_names_it(fault: str) -> None:
    changes, said = FAULTS[fault]
    sound = [replace(SOUND, node=f"n{number}") for number in (1, 1, 2, 2)]
    bad = replace(SOUND, node="n3", **changes)
    assert problems_of([*sound, replace(SOUND, node="n3")], "/out") == []
    (line,) = problems_of([*sound, bad, bad], "/out")
    assert line.startswith("  node n3: ")
    assert said in line


def test_a_slow_node_is_the_one_with_two_slow_wires() -> None:
    def ring(*seconds: float) -> list[Facts]:
        return [replace(SOUND, node=f"n{number}", link_s=s) for number, s in enumerate(seconds)]

    assert slow_nodes(ring(0.01, 0.01, 0.01, 0.012, 0.011)) == []
    (line,) = slow_nodes(
        ring(0.01, 0.01, 0.09, 0.08, 0.01)
    )  # n2 hears slowly, and n3 hears n2 slowly
    assert line.startswith("node n2: ")
    assert len(slow_nodes(ring(0.09, 0.01, 0.01, 0.01, 0.09))) == 1, "around the corner"
    assert slow_nodes(ring(0.01, 0.09)) == []
    (line,) = slow_nodes(ring(0.01, 0.09, 0.08))
    assert line.startswith("node n1: "), "of three, one slow node has two of the three wires"
    assert slow_nodes(ring(0.01, 0.09, 0.01, 0.01)) == [], "one slow wire has no culprit"


RANK = """
import os, socket, sys, time
from pathlib import Path
import torch.distributed as dist
from wm_train.checks import nodes
from wm_train.backends import get_backend
from wm_train.config.curriculum import plan_stage
from wm_train.config.typed import from_json
from wm_train.console import Progress
from wm_train.errors import SetupError
from wm_train.world import join_world, leave_world
from dataclasses import replace
run, fault, rank = from_json(Path(sys.argv[1]).read_text()), sys.argv[2], int(os.environ["RANK"])
plan = plan_stage(run, run.stage)
socket.gethostname = lambda: f"node{rank}"
clock = time.time
if rank == 1 and fault == "clock":
    clock = lambda: time.time() + 60.0
if rank == 1 and fault == "folder":
    plan = replace(plan, directory=Path(f"{plan.directory}-elsewhere"))
if rank == 1 and fault == "file":
    plan = replace(plan, directory=Path("/dev/null/out"))
if rank == 1 and fault == "memory":
    free = nodes.free_memory
    nodes.free_memory = lambda backend: free(backend) // 4
if fault == "devices":
    nodes.device_count = lambda backend: 7 if rank == 1 else 8
if fault == "wire":
    os.environ["LOCAL_RANK"] = "0"
    if rank == 1:
        send, recv = dist.send, dist.recv
        dist.send = lambda *call: (time.sleep(0.2), send(*call))
        dist.recv = lambda *call: (recv(*call), time.sleep(0.2))
if rank == 1 and fault == "data":
    data = replace(plan.config.data, path="/nowhere")
    plan = replace(plan, config=replace(plan.config, data=data))
spoken = []
progress = Progress(speaks=rank == 0)
progress.say = spoken.append
backend = get_backend("cpu")
world = join_world(backend, 60.0)
began = time.perf_counter()
try:
    nodes.preflight(plan, backend, world, progress, clock)
    said = "sound " + " ".join(line for line in spoken if "warning" in line)
except SetupError as error:
    said = str(error)
(Path(sys.argv[3]) / f"{fault}_{rank}").write_text(f"{time.perf_counter() - began:.2f} {said}")
leave_world()
os._exit(0)  # see wm_train.worker.end_process
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "sound"),
        ("clock", "node node1: got a clock 60"),
        ("folder", "node node1: got a folder without rank 0's file"),
        ("file", "node node1: got [Errno 20] Not a directory"),
        ("memory", "GiB of free memory, expected about"),
        ("devices", "node node1: got 7 devices, expected 8"),
        ("data", "node node1: data.path: got /nowhere"),
        ("wire", "sound warning: node node1: got"),
    ],
)
def test_three_processes_agree_on_who_is_bad(
    worker_config, run_ranks, tmp_path: Path, fault: str, said: str
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    run_ranks(3, tmp_path / "rank.py", worker_config(tmp_path / "run"), fault, tmp_path)
    found = [(tmp_path / f"{fault}_{rank}").read_text().split(" ", 1) for rank in range(3)]
    assert len({text for _, text in found}) == 1
    assert said in found[0][1]
    assert "node0" not in found[0][1]
    assert "node2" not in found[0][1]
    left = [file for file in tmp_path.rglob("*") if "preflight.tmp" in file.name]
    assert not left, "probes are removed"


@pytest.mark.full
def test_a_worker_that_cannot_reach_its_data_names_its_node(worker_config, tmp_path: Path) -> None:
    config = worker_config(tmp_path)
    config.write_text(config.read_text().replace('"path": "', '"path": "/moved'))
    done = subprocess.run(
        [sys.executable, "-m", "wm_train.worker", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "checking the nodes before training" in done.stderr
    assert "data.path: got /moved" in done.stderr
