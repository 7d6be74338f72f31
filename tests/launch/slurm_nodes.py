"""Two SLURM nodes on this machine, each with a network, processes and a name of its own, and what
tests ask their controller.

Not a test module: `conftest.py` hands it to the tests as the fixture `slurm`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
NETWORK, BRIDGE = "10.213.77", "wmslurm"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}({network}.254)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
MinJobAge=300
KillWait=5
NodeName=n1 NodeHostname=n1 NodeAddr={network}.1 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=n2 NodeAddr={network}.2 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# Inside the namespaces of a node: its name, the names of the others, a folder for Ray of its own.
NODE = """
set -e
hostname {name}; ip link set lo up
mkdir -p /tmp/ray; mount --bind {folder}/ray-{name} /tmp/ray; mount --bind {folder}/hosts /etc/hosts
exec slurmd -D -N {name}
"""


def command(*words: str, timeout: float = 30) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=timeout).stdout


def wait_for(
    condition: Callable[[], bool], what: str, within_s: float = 90, tell: Callable[[], str] = str
) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"waited {within_s:.0f} s for {what}\n{tell()}"
        time.sleep(0.3)


def state(job: str) -> dict[str, str]:
    return dict(
        word.split("=", 1)
        for word in command("scontrol", "show", "job", job).split()
        if "=" in word
    )


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def queued_again(job: str) -> bool:
    now = state(job)
    return now["Restarts"] != "0" and now["JobState"] == "PENDING"


def completed(job: str) -> bool:
    return state(job)["JobState"] == "COMPLETED"


def start_node(number: int, folder: Path) -> subprocess.Popen[bytes]:
    """slurmd as on a machine of its own; whatever it starts dies with it."""
    name, space = f"n{number}", f"{BRIDGE}{number}"
    for name_of in (f"spool-{name}", f"ray-{name}"):
        (folder / name_of).mkdir()
    command("ip", "netns", "add", space)
    command(
        "ip",
        "link",
        "add",
        space,
        "master",
        BRIDGE,
        "up",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        space,
    )
    command("ip", "-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
    command("ip", "-n", space, "link", "set", "eth0", "up")
    inside = ["unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.Popen(
        [
            "nsenter",
            f"--net=/run/netns/{space}",
            *inside,
            "bash",
            "-c",
            NODE.format(name=name, folder=folder),
        ]
    )


@contextmanager
def two_nodes(folder: Path) -> Iterator[None]:
    """A controller and two nodes with two make-believe devices each."""
    assert os.geteuid() == 0, "the daemons and the nodes' networks need root"
    assert shutil.which("slurmctld"), f"SLURM is not installed. Fix: {INSTALL}"
    (folder / "state").mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    host = socket.gethostname().split(".")[0]
    (folder / "hosts").write_text(
        f"127.0.0.1 localhost\n{NETWORK}.1 n1\n{NETWORK}.2 n2\n{NETWORK}.254 {host}\n"
    )
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, folder=folder, port=port, network=NETWORK)
    )
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
    nodes: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        if not Path("/run/munge/munge.socket.2").exists():
            command("install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge")
            command("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--force")
        try:
            command("ip", "link", "add", BRIDGE, "type", "bridge")
            command("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
            command("ip", "link", "set", BRIDGE, "up")
            command("slurmctld")
            nodes += [start_node(number, folder) for number in (1, 2)]
            wait_for(
                lambda: command("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"],
                "two idle nodes",
            )
            yield
        finally:
            for node in nodes:
                node.kill()
                node.wait()
            for file in folder.glob("slurmctld.pid"):
                subprocess.run(["kill", file.read_text().strip()], check=False)
            for number in (1, 2):
                subprocess.run(
                    ["ip", "netns", "del", f"{BRIDGE}{number}"], check=False, capture_output=True
                )
            subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
