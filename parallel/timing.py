"""How long this process waits in communication: one clock for parameter sharding, the sequence
verbs and whoever else reports to it.

A rank that waits for a slow one spends the time inside a collective; the slow one does not. Only
with that time taken out can step times of ranks be compared. On a host the time is the clock's; on
a device it is what the stream spent between two events, read when the step is over, so nothing
waits for the measuring. FSDP2's own hooks are used: custom collectives, and the hook that follows
HSDP's all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.compat import AllGather, ReduceScatter, all_gather_single, reduce_scatter_single


class CommClock:
    """Seconds in communication since it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._seconds = device, 0.0
        self._spans: list[tuple[torch.Event, torch.Event]] = []

    def mark(self) -> Any:
        """A point in time of the work on the current stream, for `since`."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def since(self, mark: Any) -> None:
        """What passed between `mark` and now was communication."""
        if isinstance(mark, float):
            self._seconds += time.perf_counter() - mark
        else:
            self._spans.append((mark, self.mark()))

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """For collectives between hosts, which block the caller on any device."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """The sum so far; on a device, of what has been waited for with a synchronisation."""
        self._seconds += sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        self._spans.clear()
        return self._seconds


class _Allocates:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class TimedAllGather(_Allocates, AllGather):
    """FSDP2's all-gather of parameters, timed. [n] -> [P·n]"""

    def __init__(self, clock: CommClock) -> None:
        self.clock = clock

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        mark = self.clock.mark()
        work = all_gather_single(output_tensor, input_tensor, group, async_op)
        self.clock.since(mark)
        return work


class TimedReduceScatter(_Allocates, ReduceScatter):
    """FSDP2's reduce-scatter of gradients and, with replicas, the all-reduce after it, timed. [P·n]
    -> [n]"""

    def __init__(self, clock: CommClock) -> None:
        self.clock = clock
        self._before_reduce: Any = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = super().allocate(size, dtype=dtype, device=device)
        self._before_reduce = (
            self.clock.mark()
        )  # with one shard per replica there is no call, only the all-reduce
        return out

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        mark = self.clock.mark()
        work = reduce_scatter_single(output_tensor, input_tensor, op, group, async_op)
        self.clock.since(mark)
        self._before_reduce = self.clock.mark()
        return work

    def after_all_reduce(self, reduced: Tensor) -> None:
        """FSDP2 calls this when the gradients of replicas have been summed."""
        self.clock.since(self._before_reduce)


def time_sharding(model: nn.Module, clock: CommClock, replicas: bool) -> None:
    """Have the parameter sharding of `model` report to `clock`. It computes the same, bit for
    bit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reduce = TimedReduceScatter(clock)
            module.set_custom_all_gather(TimedAllGather(clock))
            module.set_custom_reduce_scatter(reduce)
            if replicas:
                module.set_all_reduce_hook(reduce.after_all_reduce)
