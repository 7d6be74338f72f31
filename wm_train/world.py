"""Exchange small values among the processes of one run.

Everything that crosses processes outside the sequence mesh and parameter sharding goes through
`World`, as JSON text or as a small vector. It has a host-side process group of its own, so control
traffic never waits behind a device queue nor races with training's collectives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from wm_train.backends.protocol import Backend


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
    store = dist.HashStore() if size == 1 else None
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


def leave_world() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
