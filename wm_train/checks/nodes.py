"""Check every node before the first step, so that a bad one is named in seconds instead of by a
hang.

Every rank measures its devices, memory, clock, write access to the run's folder, view of the data
and link speed; the measurements are gathered, and all ranks apply the same rules to them. A slow
link is only reported; every other problem ends the run as a mistake to be corrected.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from data_shards.schema import DataError
from data_shards.storage.remote import RetryPolicy, read_info
from wm_train.backends.protocol import Backend
from wm_train.checks.data import dataset_info
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import Problem
from wm_train.console import Progress
from wm_train.training.state import SetupError
from wm_train.world import World

SKEW_S = 1.0  # between clocks, beyond what the exchange itself may have taken
MEMORY_SHARE = 0.5  # of the median's free memory; less means that something else runs there
SLOW_LINK = 0.25  # of the median's rate
SEEN_WITHIN_S = 3.0  # for a network file system to show a new file
BYTES = 1 << 20
ROUNDS = 3


@dataclass(frozen=True)
class Facts:
    """Hold the measurements of one rank. `late_s`: least certain lead of its clock over rank 0's;
    `link_s`: seconds for BYTES from the node before."""

    node: str
    devices: int | None  # None: workers run on the host
    free_bytes: int
    folder: str  # the problem with the run's folder, or ""
    data: str  # the same for the data set
    fingerprint: str
    sharding: str = ""  # what `parallel.sharding` lacks on this node
    late_s: float = 0.0
    link_s: float | None = None


def preflight(
    plan: StagePlan,
    backend: Backend,
    world: World,
    progress: Progress,
    clock: Callable[[], float] = time.time,
) -> None:
    """Check all nodes. Every rank must call this. Raises SetupError on all ranks, with the bad
    nodes and the fixes."""
    started = time.perf_counter()
    node = socket.gethostname()
    folder = plan.directory
    data, fingerprint = data_fact(plan.data_at_start.path, plan.config.data.retry_s)
    here = folder_fact(folder, world)
    facts = Facts(
        node,
        device_count(backend),
        free_memory(backend),
        here,
        data,
        fingerprint,
        sharding_fact(plan),
    )
    late = lateness(world, clock)
    nodes = list(dict.fromkeys(world.gather(node)))
    rate = all_reduce_rate(backend, world)
    link = (
        ring_seconds(backend, world, len(nodes)) if len(nodes) > 2 else None
    )  # with two nodes a slow link cannot be blamed on either
    everyone = [
        Facts(**fact) for fact in world.gather(asdict(facts) | {"late_s": late, "link_s": link})
    ]
    problems = problems_of(everyone, world.from_first(str(folder)))
    if problems:
        raise SetupError(
            "\n".join(["checking the nodes before training (key launcher.preflight):", *problems])
        )
    for line in slow_nodes(everyone):
        progress.say(f"warning: {line}")
    wires = f", all-reduce {rate / 1e6:.0f} MB/s" if rate else ""
    progress.say(
        f"checked {len(nodes)} node{'s' if len(nodes) > 1 else ''} in"
        f" {time.perf_counter() - started:.1f} s{wires}"
    )


def problems_of(everyone: list[Facts], folder: str) -> list[str]:
    """Return the problems, one line per node and kind, each naming the node."""
    problems: dict[str, None] = {}
    most_devices = max(
        (facts.devices for facts in everyone if facts.devices is not None), default=0
    )
    usual_memory = median(facts.free_bytes for facts in everyone)
    prints = [facts.fingerprint for facts in everyone if facts.fingerprint]
    usual_print = max(prints, key=prints.count, default="")
    for facts in everyone:
        where = f"  node {facts.node}: "
        if facts.devices is not None and facts.devices < most_devices:
            problems[
                f"{where}got {facts.devices} devices, expected {most_devices} as elsewhere. Fix:"
                " look for a lost device"
            ] = None
        if facts.free_bytes < MEMORY_SHARE * usual_memory:
            got, usual = facts.free_bytes / 2**30, usual_memory / 2**30
            problems[
                f"{where}got {got:.1f} GiB of free memory, expected about {usual:.1f} as elsewhere."
                " Fix: end what else runs there"
            ] = None
        if abs(facts.late_s) > SKEW_S:
            ahead = "ahead of" if facts.late_s > 0 else "behind"
            late = abs(facts.late_s)
            problems[
                f"{where}got a clock {late:.1f} s {ahead} rank 0's, expected at most {SKEW_S:.0f}"
                " s. Fix: synchronise it (chrony)"
            ] = None
        if facts.folder:
            problems[f"{where}{facts.folder} (key out; {folder})"] = None
        if facts.sharding:
            problems[f"{where}{facts.sharding}"] = None
        if facts.data:
            problems[f"{where}{facts.data}"] = None
        elif facts.fingerprint != usual_print:
            rule = "the one that the others see"
            problems[
                f"{where}got another data set at that path, expected {rule} (key data.path). Fix:"
                " mount the same storage"
            ] = None
    return list(problems)


def slow_nodes(everyone: list[Facts]) -> list[str]:
    """Return nodes whose links from the node before and to the node after are both far slower than
    the faster ones elsewhere."""
    links = {facts.node: facts.link_s for facts in everyone if facts.link_s is not None}
    if len(links) < 3:
        return []
    nodes, usual = (
        list(links),
        sorted(links.values())[(len(links) - 1) // 3],
    )  # one slow node of three makes two slow links
    after = dict(zip(nodes, [*nodes[1:], nodes[0]]))
    slow = [node for node in nodes if min(links[node], links[after[node]]) > usual / SLOW_LINK]
    rule = f"MB/s on its wires, expected about {BYTES / usual / 1e6:.0f}"
    return [f"node {node}: got {BYTES / links[node] / 1e6:.0f} {rule}" for node in slow]


def device_count(backend: Backend) -> int | None:
    """Return the number of devices this process sees; None when it trains on the host."""
    return None if backend.device.type == "cpu" else torch.accelerator.device_count()


def free_memory(backend: Backend) -> int:
    """Return the free bytes on this process's device, or on the host if it trains there."""
    if backend.free_memory:
        return backend.free_memory()
    table = Path("/proc/meminfo")  # Linux; elsewhere memory not even used for caching
    if not table.exists():
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(
        int(line.split()[1]) * 1024
        for line in table.read_text().splitlines()
        if line.startswith("MemAvailable")
    )


def total_memory(backend: Backend) -> int:
    """Return all bytes of this process's device, or of the host if it trains there."""
    if backend.device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(torch.get_device_module(backend.device).mem_get_info(backend.device)[1])


def data_fact(path: str, patience_s: float) -> tuple[str, str]:
    """Return the problem with the data set as this rank reads it, and its fingerprint. Raises
    DataError when a store is unreachable for `data.retry_s`."""
    if "://" in path:
        try:
            return "", read_info(path, RetryPolicy(budget_s=patience_s))[2].fingerprint
        except DataError as error:
            if error.passing:
                raise
            return str(error), ""
    info = dataset_info(path)
    return (str(info), "") if isinstance(info, Problem) else ("", info.fingerprint)


def sharding_fact(plan: StagePlan) -> str:
    """Return what this installation lacks for `parallel.sharding` and its offload."""
    if plan.config.parallel.sharding != "zero3":
        return ""
    from parallel.zero import check

    try:
        check(plan.config.parallel.offload_state, plan.config.parallel.nvme_path)
    except ValueError as error:
        return str(error)
    return ""


def folder_fact(folder: Path, world: World) -> str:
    """Return the problem with the run's folder on this rank: every rank must be able to write to it
    and to see the files of rank 0."""
    name = world.from_first(secrets.token_hex(8))
    first, mine = folder / f"preflight.tmp-{name}-0", folder / f"preflight.tmp-{name}-{world.rank}"
    wrong = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(name)
    except OSError as error:
        wrong = (
            f"got {error}, expected a folder that can be written. Fix: its permissions, or"
            " out=<folder>"
        )
    world.barrier()
    until = time.monotonic() + SEEN_WITHIN_S
    while not wrong and not _holds(first, name):
        if time.monotonic() > until:
            wrong = (
                "got a folder without rank 0's file, expected one folder for all nodes. Fix: a"
                " shared file system"
            )
        time.sleep(0.05)
    world.barrier()
    with contextlib.suppress(OSError):  # `wrong` already tells of an unusable folder
        mine.unlink()
    return wrong


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False


def lateness(world: World, clock: Callable[[], float]) -> float:
    """Return the seconds by which this clock is certainly ahead of rank 0's (below 0: behind it); 0
    when the exchange could explain it.

    Every rank reads its clock after rank 0 has started the exchange and before rank 0 has collected
    all replies, so a correct time lies between rank 0's two readings.
    """
    world.barrier()
    begin = world.from_first(clock())
    now = clock()
    world.gather(now)
    end = world.from_first(clock())
    return max(0.0, now - end) + min(0.0, now - begin)


def all_reduce_rate(backend: Backend, world: World) -> float:
    """Return bytes per second of an all-reduce of BYTES over all ranks, as training's collectives
    do it; 0 for one rank."""
    if world.size == 1:
        return 0.0
    tensor = torch.ones(BYTES // 4, device=backend.device)
    return BYTES / _best(lambda: _seconds(backend, lambda: dist.all_reduce(tensor)))


def ring_seconds(backend: Backend, world: World, nodes: int) -> float | None:
    """Return the seconds for BYTES from the node before this one, measured by the first rank of
    every node; None on the others."""
    leaders = [
        rank
        for rank, local in enumerate(world.gather(int(os.environ.get("LOCAL_RANK", "0"))))
        if local == 0
    ]
    if world.rank not in leaders or len(leaders) != nodes:
        return None
    place = leaders.index(world.rank)
    before, after = leaders[place - 1], leaders[(place + 1) % nodes]
    sends_in = [
        2 if nodes % 2 and p == nodes - 1 else p % 2 for p in range(nodes)
    ]  # turns in which no node sends and receives
    tensor, word = (torch.ones(count, device=backend.device) for count in (BYTES // 4, 1))

    def receive() -> None:
        dist.send(word, before)
        dist.recv(tensor, before)

    def once() -> float:
        seconds = 0.0
        for turn in range(3):
            if sends_in[place] == turn:
                dist.send(word, after)
                dist.recv(word, after)
                dist.send(tensor, after)
            elif sends_in[place - 1] == turn:
                dist.recv(
                    word, before
                )  # connected and waiting, so that a slow link elsewhere is not counted here
                seconds = _seconds(backend, receive)
        return seconds

    return _best(once)


def _best(measure: Callable[[], float]) -> float:
    return min([measure() for _ in range(ROUNDS + 1)][1:])  # the first one connects


def _seconds(backend: Backend, work: Callable[[], object]) -> float:
    backend.synchronize()
    begun = time.perf_counter()
    work()
    backend.synchronize()
    return time.perf_counter() - begun
