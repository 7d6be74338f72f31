"""Trace a training step operator by operator: bytes alive by category, operators, collectives.

It works on real tensors and on tensors without storage alike, so that a rehearsal can be compared
with the step that it stands for, operator by operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wm_train.boxes import local_tensor
from wm_train.compat import FakeTensor, TorchDispatchMode, tree_leaves
from wm_train.kernels.costs import kernel_bytes, kernel_flops
from wm_train.models.flops import operator_flops
from wm_train.plan.repeated.known_shapes import Answer, call_key, kept_answer, make_answer
from wm_train.plan.speed.collectives import Call, call_of

COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")  # namespaces of operators
ASKED_DEVICE = torch.ops.prim.device.default
GATHERED = "gathered"  # weights of units that are whole on this rank now


def nothing_inside(name: str, args: Any) -> int:
    """Return 0, the bytes of a collective that works on its arguments alone."""
    return 0


@dataclass
class Work:
    """Sum the calls of one operator in one phase: how many, bytes that they return and read, FLOPs.

    A view neither returns nor reads; a kernel's bytes are all `read`.
    """

    calls: int = 0
    returned: int = 0
    flops: int = 0
    read: int = 0

    def add(self, more: Work, times: int = 1) -> None:
        """Add more calls, each so many times."""
        self.calls += times * more.calls
        self.returned += times * more.returned
        self.flops += times * more.flops
        self.read += times * more.read

    def minus(self, less: Work) -> Work:
        """Return the calls without others."""
        numbers = (self.calls - less.calls, self.returned - less.returned)
        return Work(*numbers, self.flops - less.flops, self.read - less.read)


@cache
def operator_name(func: Any) -> str:
    """Return the name of an operator, as `str` does, which takes longer."""
    return str(func)


def _tensors(out: Any) -> list[Tensor]:
    """Return the local tensors among an operator's results."""
    if type(out) is FakeTensor:
        return [out]
    return [local_tensor(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def numbers_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int, int]:
    """Return the bytes that a call returns, its FLOPs, and the bytes that it reads."""
    returned = read = 0
    if not func.is_view:
        returned = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(out))
        read = sum(_bytes_of(leaf) for leaf in tree_leaves((args, kwargs)))
    return returned, operator_flops(func, args, kwargs, out), read


@dataclass
class Repeat:
    """Hold what a part of a step did, so that one like it can be counted without being run: its
    work, its collectives, and by category the bytes that were alive at most besides those at its
    start."""

    work: dict[tuple[str, str], Work] = field(default_factory=dict)
    collectives: list[Call] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)


def _bytes_of(leaf: Any) -> int:
    """Return the bytes behind a tensor: an expanded one is read from its storage."""
    if not isinstance(leaf, Tensor):
        return 0
    tensor = local_tensor(leaf)
    whole = tensor.numel() * tensor.element_size()
    return whole if tensor.device.type == "meta" else min(whole, tensor.untyped_storage().nbytes())


@dataclass
class Tracer(TorchDispatchMode):
    """Count live storages and operators while entered. One that is seen for the first time belongs
    to the phase that is running; `claim` says otherwise.

    peak: most bytes alive at once since `restart`; at_peak: the same by category. inside: bytes
    that a collective, by its operator and arguments, allocates while it runs, unseen by dispatch.
    """

    now: int = 0
    peak: int = 0
    phase: str = "build"
    alive: dict[str, int] = field(default_factory=dict)  # bytes by category
    at_peak: dict[str, int] = field(default_factory=dict)
    work: dict[tuple[str, str], Work] = field(default_factory=dict)  # by phase and operator
    collectives: list[Call] = field(default_factory=list)  # in order
    inside: Callable[[str, Any], int] = nothing_inside

    def __post_init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[int, str, int]] = {}  # storage -> bytes, category, when seen
        self._clock = self._peak_clock = 0
        self._times = 1
        self._known: dict[Hashable, Answer] = {}

    def restart(self) -> None:
        """Forget the peak and the operators, but not what is alive."""
        self.peak, self.at_peak, self.work = self.now, dict(self.alive), {}
        self.collectives = []
        self._peak_clock = self._clock

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count new storages and operators to a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def claim(self, tensors: Iterable[Tensor], category: str) -> int:
        """Count the storages of these tensors to a category from now on; return how many of their
        bytes were alive at the peak."""
        then = 0
        for key in {self._see(tensor) for tensor in tensors}:  # tensors may share a storage
            size, before, seen = self._held[key]
            if before != category:
                self._change(before, -size)
                self._change(category, size)
                self._held[key] = (size, category, seen)
            then += size if seen <= self._peak_clock else 0
        return then

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Follow storages that are resized in place, as FSDP2 does with gathered weights."""
        storages: Any = torch.UntypedStorage
        original = storages.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            self._resized(storage, size)
            return original(storage, size)

        storages.resize_ = resize
        try:
            yield
        finally:
            storages.resize_ = original

    def launched(self, kernel: str, arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
        """Count a kernel that is no operator of torch."""
        done = self.work.setdefault((self.phase, f"triton.{kernel}"), Work())
        done.calls += self._times
        done.read += self._times * kernel_bytes(arguments)
        done.flops += self._times * kernel_flops(kernel, arguments, constants)

    @contextmanager
    def times(self, count: int) -> Iterator[None]:
        """Count each operator inside as `count` calls, for calls that differ in nothing else."""
        before, self._times = self._times, self._times * count
        try:
            yield
        finally:
            self._times = before

    @contextmanager
    def noting(self) -> Iterator[Repeat]:
        """Note what happens inside, for `repeat`."""
        found, calls, alive = Repeat(), len(self.collectives), dict(self.alive)
        before = {key: replace(done) for key, done in self.work.items()}
        peak = (self.peak, self.at_peak, self._peak_clock)
        self.peak, self.at_peak = self.now, alive
        try:
            yield found
        finally:
            changes = {n: size - alive.get(n, 0) for n, size in self.at_peak.items()}
            found.extra = {name: size for name, size in changes.items() if size}
            if self.peak <= peak[0]:
                self.peak, self.at_peak, self._peak_clock = peak
            found.collectives = self.collectives[calls:]
            for key, done in self.work.items():
                if (more := done.minus(before.get(key, Work()))) != Work():
                    found.work[key] = more

    def repeat(self, seen: Repeat) -> None:
        """Count what was noted once more."""
        for key, more in seen.work.items():
            self.work.setdefault(key, Work()).add(more)
        self.collectives += seen.collectives
        self._clock += 1
        # what was less first, so that there is no moment with more than at the peak
        for name, size in sorted(seen.extra.items(), key=lambda one: one[1]):
            self._change(name, size)
        for name, size in seen.extra.items():
            self.alive[name] -= size
            self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a shape-only tensor's device, which torch asks for in between, and labels of a profiler
        if func is ASKED_DEVICE or func.namespace == "profiler":
            return func(*args)
        kwargs = kwargs or {}
        key = call_key(func, args, kwargs)
        known = self._known.get(key) if key else None
        if known:
            out, numbers = make_answer(known, args), known.numbers
        else:
            out = func(*args, **kwargs)
            numbers = numbers_of(func, args, kwargs, out)
            if key and (answer := kept_answer(args, out, numbers)):
                self._known[key] = answer
        communicates = func.namespace in COMMUNICATION
        self._clock += 1
        for tensor in _tensors(out):
            self._see(tensor, "communication" if communicates else None)
        done = self.work.setdefault((self.phase, operator_name(func)), Work())
        done.add(Work(1, *numbers), self._times)
        if func.namespace == "c10d":
            call = call_of(self.phase, func._opname, args)
            self.collectives += [call] * self._times if call else []
            copies = self.inside(func._opname, args)
            self._change("communication", copies)
            self._change("communication", -copies)
        return out

    def _see(self, tensor: Tensor, category: str | None = None) -> int:
        """Count the storage of a tensor if it is new, and return its key."""
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._held:
            kind = category or self.phase
            size = 0 if tensor.device.type == "meta" else storage.nbytes()
            self._held[key] = (size, kind, self._clock)
            weakref.finalize(storage, self._gone, key)
            self._change(kind, size)
        return key

    def _gone(self, key: int) -> None:
        size, category, _ = self._held.pop(key)
        self._change(category, -size)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        key = int(storage._cdata)
        if key not in self._held:
            weakref.finalize(storage, self._gone, key)
            self._held[key] = (0, GATHERED, self._clock)
        before, category, _ = self._held[key]
        self._change(category, -before)
        self._held[key] = (size, GATHERED, self._clock)
        self._change(GATHERED, size)

    def _change(self, category: str, size: int) -> None:
        self.now += size
        self.alive[category] = self.alive.get(category, 0) + size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.alive)
            self._peak_clock = self._clock
