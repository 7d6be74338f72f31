"""Two SLURM nodes on this machine, each with a network, processes and a name of its own: jobs over
both, stages in a chain, saving and queueing again, and the demo under both templates. Needs root,
iproute2 and Debian's slurmctld, slurmd, slurm-client and munge; `make test-slurm` runs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from launch import on_slurm
from launch.spec import BatchJob
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.tracking.tracker import read_steps

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A controller and two nodes with two make-believe devices each."""
    assert os.geteuid() == 0, "the daemons and the nodes' networks need root"
    assert shutil.which("slurmctld"), f"SLURM is not installed. Fix: {INSTALL}"
    folder = tmp_path_factory.mktemp("slurm")
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


@pytest.fixture
def submit(spec, view, slurm: None, tmp_path: Path) -> Callable[..., str]:
    """submit(program, name, ...) -> id of a job of four workers on two nodes, in a folder of that
    name."""

    def go(program: str, name: str, **batch: object) -> str:
        job = BatchJob(name, submit=True, time="0:10:00", devices="gpu:2", **batch)  # type: ignore[arg-type]
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


def test_a_chain_of_two_stages_over_two_nodes(submit, tmp_path: Path) -> None:
    program = """
told = " ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME"))
(place / f"{os.environ['SLURM_JOB_NAME']}_{rank}").write_text(told)
"""
    first = submit(program, "one")
    second = submit(program, "two", after=tmp_path / "one" / "slurm_job_id")
    wait_for(lambda: completed(second), "the second stage")
    assert state(first)["JobState"] == "COMPLETED"
    for name in ("one", "two"):
        told = sorted((tmp_path / f"{name}_{rank}").read_text() for rank in range(4))
        assert told == ["4 0 n1", "4 0 n2", "4 1 n1", "4 1 n2"]
    started = {
        name: max(file.stat().st_mtime for file in tmp_path.glob(f"{name}_*"))
        for name in ("one", "two")
    }
    assert started["one"] < started["two"]


def test_a_failed_stage_keeps_the_next_one_from_starting(submit, tmp_path: Path) -> None:
    first = submit("sys.exit(3)", "bad")
    second = submit("(place / 'ran').touch()", "next", after=tmp_path / "bad" / "slurm_job_id")
    wait_for(lambda: state(first)["JobState"] == "FAILED", "the failure")
    wait_for(
        lambda: state(second)["Reason"] == "DependencyNeverSatisfied",
        "the dependency to be given up",
    )
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
    command(
        "scancel", "--batch", "--signal=USR1", job
    )  # what --signal=B:USR1@120 sends when the limit is near
    wait_for(lambda: queued_again(job), "the job to be queued again")
    assert sorted(file.name for file in tmp_path.glob("saved_*")) == [
        "saved_0",
        "saved_1",
        "saved_2",
        "saved_3",
    ]
    command("scancel", job)


@pytest.fixture
def submit_array(spec, view, slurm: None, tmp_path: Path) -> Callable[[str], str]:
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
    submit_array, tmp_path: Path
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
        wait_for(up.exists, f"{task} to begin")
        # scancel cannot: of an array's tasks it delivers the signal, says that it could not, and
        # tries again.
        script = f"job{int(state(task)['JobId']):05d}/slurm_script"
        os.kill(int(command("pgrep", "-o", "-f", script)), signal.SIGUSR1)
        wait_for(partial(queued_again, task), f"{task} in the queue again")
        assert (tmp_path / f"saved_{task[-1]}").exists()

    def start_now(task: str) -> None:
        """SLURM would wait two minutes; a node refuses a job within a second or two of its end."""
        time.sleep(5)
        subprocess.run(
            ["scontrol", "update", f"JobId={task}", "StartTime=now"], check=False, timeout=30
        )

    save(first)
    wait_for(partial(queued_again, second), "the second stage in the queue again")
    assert not (tmp_path / "order").exists()
    for task in (first, second):
        start_now(task)
        wait_for(partial(completed, task), task, within_s=200)
    start_now(last)
    save(last)
    start_now(last)
    wait_for(partial(completed, last), last, within_s=200)
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2"]
    assert completed(first)
    assert completed(second)


def test_a_failed_stage_of_an_array_keeps_the_others_from_running(
    submit_array, tmp_path: Path
) -> None:
    job = submit_array(
        "(place / os.environ['SLURM_ARRAY_TASK_ID']).joinpath('ran').touch(); sys.exit(3)"
    )
    wait_for(
        lambda: state(f"{job}_2")["JobState"] == "FAILED", "the last stage to give up", within_s=300
    )
    assert [(tmp_path / str(stage) / "ran").exists() for stage in range(3)] == [True, False, False]


@pytest.fixture
def demo(gameplay: Path, slurm: None, tmp_path: Path) -> Callable[..., None]:
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
    demo, runner: str, tmp_path: Path
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
        return state(jobs[1])["JobState"] in ENDED or state(jobs[0])["JobState"] in ENDED[1:]

    wait_for(over, "both stages", within_s=400, tell=partial(logs, tmp_path))
    assert [state(job)["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"], logs(tmp_path)
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
    demo, runner: str, tmp_path: Path
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
    wait_for(lambda: queued_again(job), "the job to be queued again", within_s=300)
    saved = store.committed(stage / "checkpoints")
    assert len(saved) == 1, logs(tmp_path)
    steps = read_manifest(saved[0]).step
    for file in (stage / "config.json", stage / "slurm_job.json"):
        if file.exists():  # let the second part be short
            file.write_text(file.read_text().replace("100000", str(steps + 5)))
    time.sleep(15)  # nodes refuse a job while they clean up after it; SLURM would wait two minutes
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(
        lambda: state(job)["JobState"] in ENDED,
        "the job to end",
        within_s=200,
        tell=partial(logs, tmp_path),
    )
    assert completed(job), logs(tmp_path)
    assert f"continuing from {saved[0]}" in logs(tmp_path)
    assert [row["step"] for row in read_steps(stage / "metrics.jsonl")] == list(range(1, steps + 6))
