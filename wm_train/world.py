"""Exchange small values among the processes of one run.

Everything that crosses processes outside the sequence mesh and parameter sharding goes through
`World`, as JSON text or as a small vector. It has a host-side process group of its own, so control
traffic never waits behind a device queue nor races with training's collectives.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from wm_train.backends.protocol import Backend
from wm_train.console import complain

BACKLOG = 4096  # ranks that connect at the same moment
LOOK_S = 5.0  # for a machine to answer
HERE = "here"  # key of the number of workers that have come


@dataclass(frozen=True)
class World:
    """Identify this process among `size`, and exchange values over `group`.

    group: the host-side process group; None is the default one.
    """

    rank: int
    size: int
    group: ProcessGroup | None = None

    def duplicate(self) -> World:
        """Return the same ranks over a second process group, for a background thread.

        Every process must call this.
        """
        return (
            self if self.size == 1 else World(self.rank, self.size, dist.new_group(backend="gloo"))
        )

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Gather every process's JSON value, in rank order, on every process."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()], dtype=torch.int64), group=self.group)
        longest = int(max(lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(
            texts, torch.nn.functional.pad(mine, (0, longest - mine.numel())), group=self.group
        )
        return [
            json.loads(bytes(t[: int(n)].tolist()).decode())
            for t, n in zip(texts, lengths, strict=True)
        ]

    def from_first(self, value: Any) -> Any:
        """Return rank 0's JSON value on every process.

        Clocks and file systems differ between nodes, so rank 0 decides for all.
        """
        return self.gather(value if self.rank == 0 else None)[0]

    def gather_numbers(self, values: list[float]) -> torch.Tensor:
        """Gather [k] per process -> [size, k] float64 on the host.

        The order is the same everywhere, so sums over it repeat to the bit.
        """
        mine = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows)

    def gather_named(self, values: Mapping[str, float]) -> dict[str, list[float]]:
        """Return name -> the value of every rank, in rank order; all ranks give the same names."""
        columns = self.gather_numbers(list(values.values())).T.tolist()
        return dict(zip(values, columns, strict=True))

    def gather_tensors(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Gather one tensor per process on the host, in rank order.

        They share the dtype and the number of dimensions, but may have any shapes.
        """
        mine = mine.cpu()
        if self.size == 1:
            return [mine]
        shapes = self.gather(list(mine.shape))
        largest = max(torch.Size(shape).numel() for shape in shapes)
        padded = torch.nn.functional.pad(mine.reshape(mine.numel()), (0, largest - mine.numel()))
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.group)
        return [
            row[: torch.Size(shape).numel()].reshape(shape)
            for row, shape in zip(rows, shapes, strict=True)
        ]


def join_world(backend: Backend, timeout_s: float) -> World:
    """Join the other workers, given RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Every launcher sets these variables.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # a single process uses the same code as many, but needs no address
    store = dist.HashStore() if size == 1 else meeting_place(rank, size, timeout_s)
    dist.init_process_group(
        backend.collectives,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return World(
        rank,
        size,
        None if backend.collectives == "gloo" or size == 1 else dist.new_group(backend="gloo"),
    )


def meeting_place(rank: int, size: int, timeout_s: float) -> dist.Store | None:
    """Return the store where the workers meet, which rank 0 serves at MASTER_ADDR and nowhere else:
    torch's own listens on all networks, and takes keys from anybody.

    None under torchrun, whose agent serves it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = None
    if rank == 0:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
            served = listener.detach()
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # an address that a gateway translates
                raise
            complain(f"{host} is no address of this machine: the rendezvous listens on all of them")
    # torch waits deaf to signals: so it is called when there is nothing left to wait for
    until = time.monotonic() + timeout_s
    while rank and not _answers(host, port):
        _wait_more(until, f"no answer of rank 0 at {host}:{port}", timeout_s)
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, size, rank == 0, timeout, False, master_listen_fd=served)
    here = store.add(HERE, 1)
    while here < size:
        _wait_more(until, f"{here} of {size} workers", timeout_s)
        here = store.add(HERE, 0)
    return store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=LOOK_S).close()
    except OSError:
        return False
    return True


def _wait_more(until: float, got: str, timeout_s: float) -> None:
    """Pause for a moment. Raises TimeoutError when `until` is over."""
    if time.monotonic() > until:
        raise TimeoutError(
            f"rendezvous: got {got} within {timeout_s:.0f} s, expected all (key"
            " backend.collective_timeout_s). Fix: see what the logs of the others say"
        )
    time.sleep(LOOK_S / 100)


def leave_world() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
