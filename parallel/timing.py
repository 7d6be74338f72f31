"""Measure how long this process waits in communication, with one clock for all of it.

A rank that waits for a slow one spends the time inside a collective; the slow one does not. Step
times of ranks can be compared only without that time. On a host the time is wall-clock time; on a
device it is the time between two events of the stream, read at the end of the step, so measuring
never synchronises. It uses FSDP2's own hooks: custom collectives, and the hook after HSDP's
all-reduce. Parameter sharding and the sequence verbs report to the clock, and so may others.
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
    """Sum the seconds spent in communication since it was created."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._seconds = device, 0.0
        self._spans: list[tuple[torch.Event, torch.Event]] = []

    def mark(self) -> Any:
        """Return the current point in time of the current stream, for `since`."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def since(self, mark: Any) -> None:
        """Count the time between `mark` and now as communication."""
        if isinstance(mark, float):
            self._seconds += time.perf_counter() - mark
        else:
            self._spans.append((mark, self.mark()))

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Time a collective between hosts, which blocks the caller on any device."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Return the sum so far; on a device call it after a synchronisation."""
        self._seconds += sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        self._spans.clear()
        return self._seconds


class _Allocates:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class TimedAllGather(_Allocates, AllGather):
    """Time FSDP2's all-gather of parameters, [n] -> [P·n]."""

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
    """Time FSDP2's reduce-scatter of gradients, [P·n] -> [n], and the all-reduce over replicas."""

    def __init__(self, clock: CommClock) -> None:
        self.clock = clock
        self._before_reduce: Any = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = super().allocate(size, dtype=dtype, device=device)
        # with one shard per replica there is no call, only the all-reduce
        self._before_reduce = self.clock.mark()
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
        """Stop the clock; FSDP2 calls this when the gradients of replicas have been summed."""
        self.clock.since(self._before_reduce)


def time_sharding(model: nn.Module, clock: CommClock, replicas: bool) -> None:
    """Time the parameter sharding of `model` with `clock`; results stay the same, bit for bit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            reduce = TimedReduceScatter(clock)
            module.set_custom_all_gather(TimedAllGather(clock))
            module.set_custom_reduce_scatter(reduce)
            if replicas:
                module.set_all_reduce_hook(reduce.after_all_reduce)
