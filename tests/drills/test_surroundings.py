"""Run in what surrounds a run on other people's machines: locales, stale variables, proxies, small
limits, neighbours that send garbage to every port. It ends as elsewhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STALE = {
    "RANK": "7",
    "WORLD_SIZE": "99",
    "LOCAL_RANK": "5",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "10.9.9.9",
    "MASTER_PORT": "1",
    "GROUP_RANK": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "old",
    "TORCHELASTIC_RESTART_COUNT": "4",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "3",
}
NOWHERE = "http://127.0.0.1:1"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), NOWHERE)
PROXIES |= {name.upper(): NOWHERE for name in PROXIES}
SURROUNDINGS = {
    "plain": ({}, ""),
    "C locale": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
    "ASCII output": ({"PYTHONIOENCODING": "ascii:strict"}, ""),
    "Turkish": ({"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}, ""),
    "stale variables": (STALE, ""),
    "proxies": (PROXIES, ""),
    "few descriptors": ({}, "ulimit -n 256;"),
    "tiny shared memory": ({}, "mount -t tmpfs -o size=1m none /dev/shm;"),
    "garbage on every port": ({}, ""),
}


def ports_of(mark: str) -> set[int]:
    """Return the ports at which processes with `mark` in their environment listen."""
    sockets, ports = set(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                sockets |= {os.readlink(file) for file in (folder / "fd").iterdir()}
        except OSError:
            continue
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            local, state, inode = [line.split()[place] for place in (1, 3, 9)]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                ports.add(int(local.rpartition(":")[2], 16))
    return ports


def send_garbage(mark: str, ended: threading.Event, hit: set[int]) -> None:
    """Write bytes that mean nothing to every port, until told to end."""
    while not ended.wait(0.5):
        for port in ports_of(mark):
            for bytes_ in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" * 64):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                        connection.sendall(bytes_)
                        hit.add(port)
                except OSError:
                    continue


@pytest.mark.drill
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_a_run_ends_as_elsewhere(
    gameplay: Path, tmp_path: Path, launcher: str, surrounding: str
) -> None:
    variables, before = SURROUNDINGS[surrounding]
    if "mount" in before and os.geteuid() != 0:
        pytest.skip("needs root for a mount of its own")
    stage, out = "recipe.stages.short.", tmp_path / "läufe µ"
    command = [
        *("-m", "wm_train.launch", "experiment=demo", "recipe=demo", "stage=1", "tracker=none"),
        *(f"launcher={launcher}", "launcher.workers=2", "launcher.max_restarts=0"),
        *(f"data.path={gameplay}", f"out={out}", "model.depth=1", "model.width=32"),
        *("model.heads=2", f"{stage}frames=41", f"{stage}global_batch=2", f"{stage}steps=40"),
        *(f"{stage}optimizer.warmup_steps=1", "trainer.samples=0", "trainer.validation_clips=0"),
    ]
    shell = ["sh", "-c", f'{before} exec "$0" "$@"', sys.executable, *command]
    wrapped = ["unshare", "-m", *shell] if "mount" in before else shell
    mark, hit, ended = f"WM_TRAIN_DRILL={tmp_path.name}", set[int](), threading.Event()
    sender = threading.Thread(target=send_garbage, args=(mark, ended, hit))
    with tempfile.TemporaryDirectory(prefix="d") as scratch:
        environment = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": scratch,
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
            **dict([mark.split("=")]),
        }
        if surrounding.startswith("garbage"):
            sender.start()
        try:
            done = subprocess.run(
                wrapped,
                cwd=ROOT,
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=900,
            )
        finally:
            ended.set()
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said
    rows = (out / "demo" / "short" / "metrics.jsonl").read_text().splitlines()
    print(f"{launcher}, {surrounding}: code {done.returncode}, {len(rows)} steps, {len(hit)} ports")
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 41))
    assert "Traceback" not in said, said
    assert bool(hit) == surrounding.startswith("garbage")
