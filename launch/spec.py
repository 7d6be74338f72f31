"""What a launcher is asked to run. Every launcher gives each rank the same environment variables
and the same command."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

USER_ERROR = 2  # a worker's exit code for what a person must change: trying again cannot help
# sysexits' EX_IOERR, a worker's exit code for storage that did not answer: trying again may help,
# at the same step too
NO_STORAGE = 74
INTERRUPTED = 128  # plus the signal's number, as shells do
JOB_ID = "slurm_job_id"  # file in a stage's folder
TAIL = 20  # last lines of a rank's log that its death is reported with


@dataclass(frozen=True)
class BatchJob:
    """What a queueing system is asked for, besides the workers. None leaves it to the cluster."""

    name: str
    after: Path | None = None  # file with the id of a job that must end well before this one starts
    submit: bool = False
    runner: str = "torchrun"  # torchrun | ray: who starts the workers inside the job
    # dependency | array: a job per stage that waits for the one before, or one array for all of
    # them
    chain: str = "dependency"
    account: str | None = None
    partition: str | None = None
    time: str | None = None
    devices: str | None = None
    container: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    signal_s: int = 120
    requeue: bool = True


@dataclass(frozen=True)
class Pods:
    """What Kubernetes is asked for, besides the workers."""

    name: str
    image: str
    claim: str  # persistent volume claim that holds data and runs
    mount: str  # where all machines see it
    namespace: str = "default"
    memory: str = "16Gi"  # of a node
    devices: str | None = None  # of a node, as resource:count
    environment_from: str | None = None  # whose keys become environment variables
    submit: bool = False


@dataclass(frozen=True)
class LaunchSpec:
    """`workers` processes of `command`, all or nothing.

    In `command`, `{python}` is the interpreter of the machine the process runs on and `{config}`
    the path of a file there that holds `config_text`: `config_path` where it is shared between
    machines, else a temporary copy.
    """

    command: tuple[str, ...]
    workers: int
    config_path: Path
    config_text: str
    title: str = field(default="", kw_only=True)  # for people
    logs: Path  # one folder per attempt, one file per rank
    directory: Path = field(default_factory=Path.cwd)  # working directory of the workers
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus_per_worker: int = 1
    # this many ranks in a row on one node, as they talk most; as many of them as fit where no node
    # has room for all
    together: int = 1
    accelerators: bool = (
        False  # one per worker, of whatever kind the machines have; without any, CPUs will do
    )
    address: str | None = None  # of a running cluster
    nodes: int = 1  # machines that start this same command themselves (torchrun)
    endpoint: str | None = None  # host:port where they meet
    batch: BatchJob | None = None  # for a queueing system
    pods: Pods | None = None  # for Kubernetes
    max_restarts: int = 0
    backoff_s: float = 1.0  # before the first restart; doubles each time
    backoff_limit_s: float = 60.0
    grace_s: float = 30.0  # between asking a worker to stop and killing it
    place_s: float = 60.0  # how long to wait for free resources
    fewer: tuple[
        int, ...
    ] = ()  # smaller numbers of workers that will do after a loss, largest first
    grow_s: float = 60.0  # with fewer of them, the least time between a start and growing again


def rank_environment(
    rank: int, world: int, local_rank: int, local_world: int, address: str, port: int
) -> dict[str, str]:
    """What torch.distributed's env:// rendezvous and the worker read."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def fill(command: tuple[str, ...], config: str) -> list[str]:
    """`command` with its placeholders filled in for this machine."""
    return [
        part.replace("{python}", sys.executable).replace("{config}", config) for part in command
    ]


def write_private(path: Path, text: str) -> None:
    """A file for its owner only: configs may hold the tracker's password. Several nodes may write
    the same one at once."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def describe_exit(code: int) -> str:
    """`exit code 3`, or the signal's name for a negative code as subprocess reports it."""
    import signal

    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
