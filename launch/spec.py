"""Define a launch: every launcher gives each rank the same environment variables and command."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

USER_ERROR = 2  # a worker's exit code for a user's mistake: trying again cannot help
# sysexits' EX_IOERR, a worker's exit code for storage that did not answer: trying again may help,
# at the same step too
NO_STORAGE = 74
PREEMPTED = 75  # EX_TEMPFAIL, a worker's exit code when it was asked to leave and has saved
INTERRUPTED = 128  # plus the signal's number, as shells do
JOB_ID = "slurm_job_id"  # file in a stage's folder
AGENT = ("{python}", "-m", "launch.torchrun_agent")
HERE = "127.0.0.1"
GLOO = "GLOO_SOCKET_IFNAME"
TAIL = 20  # last lines of a rank's log that its death is reported with


@dataclass(frozen=True)
class BatchJob:
    """Store the request to a queueing system besides the workers. None leaves it to the cluster."""

    name: str
    after: Path | None = None  # file with the id of a job that must succeed first
    submit: bool = False
    runner: str = "torchrun"  # torchrun | ray: the program that starts the workers
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
    """Store the request to Kubernetes besides the workers."""

    name: str
    image: str
    claim: str  # persistent volume claim that holds data and runs
    mount: str  # where all machines see it
    namespace: str = "default"
    memory: str = "16Gi"  # per node
    devices: str | None = None  # per node, as resource:count
    environment_from: str | None = None  # Secret whose keys become environment variables
    submit: bool = False


@dataclass(frozen=True)
class LaunchSpec:
    """Describe `workers` processes of `command`, all or nothing.

    In `command`, `{python}` is the interpreter of the machine that the process runs on and
    `{config}` the path of a file there with `config_text`: `config_path` where machines share it,
    else a temporary copy.
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
    # this many consecutive ranks go on one node, as they communicate most; if no node has room for
    # all of them, as many as fit
    together: int = 1
    # one per worker, of whatever kind the machines have; without any, CPUs will do
    accelerators: bool = False
    address: str | None = None  # of a running cluster
    nodes: int = 1  # machines that start this same command themselves (torchrun)
    endpoint: str | None = None  # host:port of their rendezvous
    batch: BatchJob | None = None  # for a queueing system
    pods: Pods | None = None  # for Kubernetes
    # runs beside the workers where the command that made this has ended: it prints `held` once it
    # holds the stage's folder, also between two attempts, and fails where it may not
    holder: tuple[str, ...] = ()
    max_restarts: int = 0
    backoff_s: float = 1.0  # before the first restart; doubles each time
    backoff_limit_s: float = 60.0
    grace_s: float = 30.0  # between asking a worker to stop and killing it
    place_s: float = 60.0  # how long to wait for free resources
    fewer: tuple[
        int, ...
    ] = ()  # smaller numbers of workers that will do after a loss, largest first
    grow_s: float = 60.0  # with fewer of them, the least time between a start and growing again


def on_this_machine() -> dict[str, str]:
    """Return the variables that keep the processes of one machine off its networks.

    Gloo would listen at the address of the machine's name, which need not be known either.
    """
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {GLOO: loopback[0]} if loopback and GLOO not in os.environ else {}


def rank_environment(
    rank: int, world: int, local_rank: int, local_world: int, address: str, port: int
) -> dict[str, str]:
    """Return the variables that torch.distributed's env:// rendezvous and the worker read."""
    return {
        **(on_this_machine() if address == HERE else {}),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # what a shell inside another torchrun has: no agent serves this rendezvous
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def fill(command: tuple[str, ...], config: str) -> list[str]:
    """Return `command` with its placeholders filled in for this machine."""
    return [
        part.replace("{python}", sys.executable).replace("{config}", config) for part in command
    ]


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, as configs may hold the tracker's password.

    Several nodes may write the same file at once.
    """
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def describe_exit(code: int) -> str:
    """Return `exit code 3`, or the signal's name for a negative code as subprocess reports it."""
    import signal

    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
