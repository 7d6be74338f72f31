"""Two SLURM nodes on this machine: jobs over both, stages in a chain, saving and queueing again. Needs root and Debian's
slurmctld, slurmd, slurm-client and munge; `make test-slurm` runs it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch import on_slurm
from launch.spec import BatchJob

pytestmark = pytest.mark.slurm
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def command(*words: str, timeout: float = 30) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=timeout).stdout


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 90) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"waited {within_s:.0f} s for {what}"
        time.sleep(0.3)


def state(job: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command("scontrol", "show", "job", job).split() if "=" in word)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A controller and two nodes with two make-believe devices each."""
    assert os.geteuid() == 0, "the daemons need root"
    assert shutil.which("slurmctld"), f"SLURM is not installed. Fix: {INSTALL}"
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports))
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        if not Path("/run/munge/munge.socket.2").exists():
            command("install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge")
            command("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--force")
        try:
            for daemon in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
                command(*daemon)
            wait_for(lambda: command("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "two idle nodes")
            yield
        finally:
            for file in folder.glob("*.pid"):
                subprocess.run(["kill", file.read_text().strip()], check=False)


@pytest.fixture
def submit(spec, view, slurm: None, tmp_path: Path) -> Callable[..., str]:
    """submit(program, name, ...) -> id of a job of four workers on two nodes, in a folder of that name."""

    def go(program: str, name: str, **batch: object) -> str:
        job = BatchJob(name, submit=True, time="0:10:00", devices="gpu:2", **batch)  # type: ignore[arg-type]
        asked = spec(program, workers=4, nodes=2, batch=job, directory=tmp_path, environment={"OMP_NUM_THREADS": "1"})
        assert on_slurm.run(replace(asked, logs=tmp_path / name / "logs"), view) == 0, view.out.getvalue()
        return (tmp_path / name / "slurm_job_id").read_text().strip()

    return go


def test_a_chain_of_two_stages_over_two_nodes(submit, tmp_path: Path) -> None:
    program = """
told = " ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME"))
(place / f"{os.environ['SLURM_JOB_NAME']}_{rank}").write_text(told)
"""
    first = submit(program, "one")
    second = submit(program, "two", after=tmp_path / "one" / "slurm_job_id")
    wait_for(lambda: state(second)["JobState"] == "COMPLETED", "the second stage")
    assert state(first)["JobState"] == "COMPLETED"
    for name in ("one", "two"):
        told = sorted((tmp_path / f"{name}_{rank}").read_text() for rank in range(4))
        assert told == ["4 0 n1", "4 0 n2", "4 1 n1", "4 1 n2"]
    started = {name: max(file.stat().st_mtime for file in tmp_path.glob(f"{name}_*")) for name in ("one", "two")}
    assert started["one"] < started["two"]


def test_a_failed_stage_keeps_the_next_one_from_starting(submit, tmp_path: Path) -> None:
    first = submit("sys.exit(3)", "bad")
    second = submit("(place / 'ran').touch()", "next", after=tmp_path / "bad" / "slurm_job_id")
    wait_for(lambda: state(first)["JobState"] == "FAILED", "the failure")
    wait_for(lambda: state(second)["Reason"] == "DependencyNeverSatisfied", "the dependency to be given up")
    command("scancel", second)
    assert not (tmp_path / "ran").exists()


def test_before_the_limit_the_workers_save_and_the_job_queues_again(submit, tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGTERM, lambda *_: ((place / f"saved_{rank}").touch(), sys.exit(75)))
(place / f"up_{rank}").touch()
time.sleep(120)
"""
    job = submit(program, "long")
    wait_for(lambda: len(list(tmp_path.glob("up_*"))) == 4, "four workers")
    command("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends when the limit is near
    wait_for(lambda: (state(job)["Restarts"], state(job)["JobState"]) == ("1", "PENDING"), "the job to be queued again")
    assert sorted(file.name for file in tmp_path.glob("saved_*")) == ["saved_0", "saved_1", "saved_2", "saved_3"]
    command("scancel", job)
