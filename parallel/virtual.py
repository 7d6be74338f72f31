"""Run all P ranks of a sequence group in one process on one device, with the real algorithms.

`run_virtual(body, ring, ulysses)` calls body(comm) once per rank, each in a thread of its own.
Threads wait for each other only in the *forward* pass: at each verb the last one to arrive runs the
verb for all of them as one joined graph node. One `backward()` from the sum of the ranks' results
then serves all, single-threaded, and nothing ever waits in it. Under activation checkpointing a
rank replays its verb results (`Tape`).

The same generators run with the same reduction order as over processes, so results equal those of
gloo bit for bit (with one thread each).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from parallel.comm import (
    AllGather,
    Begin,
    Exchange,
    Finish,
    Member,
    Program,
    Tape,
    Traffic,
    Verb,
    apply,
    sent_bytes,
)
from parallel.compat import in_backward

Result = TypeVar("Result")


class VirtualGroup:
    """Host every rank and execute a list of requests, one per rank, as list operations."""

    joined = True
    tape: Tape | None = None
    scope = ""

    def __init__(self, ring: int, ulysses: int) -> None:
        self.members: tuple[Member, ...] = tuple(
            Member(r, u, ring, ulysses) for r in range(ring) for u in range(ulysses)
        )
        self.traffic = [Traffic() for _ in self.members]

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run a verb for all ranks; tensors and outputs are concatenated over ranks."""
        return apply(self, verb, *tensors)

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        answers: list[Any] = [None] * len(programs)
        while True:
            steps = [
                _advance(program, answer) for program, answer in zip(programs, answers, strict=True)
            ]
            requests = [request for request, _ in steps]
            if all(request is None for request in requests):
                return [result for _, result in steps]
            # All ranks must yield the same kind of request over the same axis.
            first = requests[0]
            assert None not in requests, f"{label}: ranks disagree on the number of collectives"
            assert all(type(request) is type(first) for request in requests), (
                f"{label}: ranks disagree on the collective"
            )
            if isinstance(first, Finish):
                answers = [request.ticket for request in requests]
                continue
            if isinstance(first, Begin):
                requests = [request.exchange for request in requests]
            assert len({request.axis for request in requests}) == 1, (
                f"{label}: ranks disagree on the axis"
            )
            for member, request, traffic in zip(self.members, requests, self.traffic, strict=True):
                traffic.add(label, sent_bytes(request, member))
            answers = self._answer(requests)

    def _answer(self, requests: list[Any]) -> list[Any]:
        answers = []
        for member in self.members:
            peers, place = self._peers(member, requests[0].axis)
            if isinstance(requests[0], AllGather):
                # [*] -> list over ranks of [*]
                answers.append([requests[p].tensor for p in peers])
            else:
                assert isinstance(requests[0], Exchange)
                # parts[j] of every i -> list over i
                answers.append([requests[p].parts[place] for p in peers])
        return answers

    def _peers(self, member: Member, axis: str) -> tuple[list[int], int]:
        """Return the indices of the ranks on this rank's axis, and its place among them."""
        if axis == "ulysses":
            return [
                member.ring_index * member.ulysses + u for u in range(member.ulysses)
            ], member.ulysses_index
        if axis == "ring":
            return [
                r * member.ulysses + member.ulysses_index for r in range(member.ring)
            ], member.ring_index
        return list(range(member.size)), member.index


def _advance(program: Program, answer: Any) -> tuple[Any, Any]:
    """Resume a program -> (request, None) or (None, result)."""
    try:
        return program.send(answer), None
    except StopIteration as done:
        return None, done.value


class _Meeting:
    """Synchronise the threads of one virtual group."""

    def __init__(self, group: VirtualGroup) -> None:
        self.group = group
        self.condition = threading.Condition()
        self.calls: dict[int, tuple[Verb, tuple[Tensor | None, ...], str]] = {}
        self.outputs: tuple[Tensor, ...] = ()
        self.turn = 0
        self.finished = 0
        self.failure: str | None = None

    def call(
        self, index: int, verb: Verb, tensors: tuple[Tensor | None, ...], scope: str
    ) -> tuple[Tensor, ...]:
        size = len(self.group.members)
        with self.condition:
            turn = self.turn
            self.calls[index] = (verb, tensors, scope)
            self._check_absent()
            if len(self.calls) == size:
                try:
                    self._serve()
                except BaseException as error:
                    self._fail(f"{type(error).__name__}: {error}")
                    raise
            self.condition.wait_for(lambda: self.turn > turn or self.failure is not None)
            if self.turn == turn:
                raise RuntimeError(f"another virtual rank failed: {self.failure}")
            width = len(self.outputs) // size
            return self.outputs[index * width : (index + 1) * width]

    def _serve(self) -> None:
        ordered = [self.calls[i] for i in range(len(self.calls))]
        verb, _, self.group.scope = ordered[0]
        if any(other != verb for other, *_ in ordered):
            raise ValueError(
                f"virtual ranks disagree on the verb: got {[other for other, *_ in ordered]},"
                " expected the same on all"
            )
        self.outputs = self.group.apply(verb, *(x for _, tensors, _ in ordered for x in tensors))
        self.calls = {}
        self.turn += 1
        self.condition.notify_all()

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.condition.notify_all()

    def _check_absent(self) -> None:
        if self.calls and self.finished and self.failure is None:
            self._fail(
                "a rank ended while others wait in a verb: all ranks must call the same verbs"
            )

    def done(self, failure: BaseException | None) -> None:
        with self.condition:
            self.finished += 1
            if failure is not None:
                self._fail(f"{type(failure).__name__}: {failure}")
            self._check_absent()


class Call(NamedTuple):
    """Record one verb call of one rank, enough for `traffic.py` to predict its cost."""

    scope: str
    verb: Verb
    tensors: tuple[tuple[torch.Size, torch.dtype], ...]


class VirtualComm:
    """Run verbs for one rank of a virtual group."""

    joined = False

    def __init__(self, meeting: _Meeting, index: int) -> None:
        self._meeting, self._index = meeting, index
        self.members: tuple[Member, ...] = (meeting.group.members[index],)
        self.tape: Tape | None = None
        self.scope = ""
        self.calls: list[Call] = []

    @property
    def traffic(self) -> Traffic:
        return self._meeting.group.traffic[self._index]

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        tape = self.tape
        if tape is not None and tape.replaying:
            return tuple(x.detach().requires_grad_(needs) for x, needs in tape.next())
        if in_backward():
            raise RuntimeError(
                "a virtual rank called a verb inside backward: got a plain torch.utils.checkpoint,"
                " expected one that replays collectives. Fix:"
                " parallel.checkpointing.checkpoint(function, *args, sequence=sequence)"
            )
        self.calls.append(
            Call(self.scope, verb, tuple((x.shape, x.dtype) for x in tensors if x is not None))
        )
        outputs = self._meeting.call(self._index, verb, tensors, self.scope)
        if tape is not None:
            tape.answers.append([(x.detach(), x.requires_grad) for x in outputs])
        return outputs

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        raise AssertionError("a virtual rank's programs are run by its group")


def run_virtual(
    body: Callable[[VirtualComm], Result], ring: int = 1, ulysses: int = 1
) -> tuple[list[Result], list[Traffic]]:
    """Call body(comm) for every rank at once and return results and traffic in rank order.

    The caller's autograd mode, autocast, default dtype and device hold in every thread. Random
    numbers must come from keyed generators: all threads share torch's global one, so what a rank
    draws from it depends on timing.
    """
    group = VirtualGroup(ring, ulysses)
    meeting = _Meeting(group)
    size = len(group.members)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size
    # These settings belong to a thread, so each rank's thread must be given the caller's.
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    present = torch.accelerator.current_accelerator()
    kinds = [
        kind
        for kind in ("cpu", *([present.type] if present else []))
        if torch.is_autocast_enabled(kind)
    ]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
    accelerator = (
        torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    )

    def enter(index: int) -> None:
        failure: BaseException | None = None
        try:
            torch.set_default_dtype(dtype)
            if accelerator is not None:  # each thread has its own current device
                torch.accelerator.set_device_index(accelerator)
            with torch.set_grad_enabled(grad):
                contexts = [torch.autocast(kind, dtype=cast) for kind, cast in casts]
                for context in contexts:
                    context.__enter__()
                results[index] = body(VirtualComm(meeting, index))
        except BaseException as error:
            failure = errors[index] = error
        finally:
            meeting.done(failure)

    threads = [
        threading.Thread(target=enter, args=(i,), name=f"virtual-rank-{i}", daemon=True)
        for i in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Raise the cause, not the errors of ranks that stopped because of it.
    found = [e for e in errors if e is not None]
    if found:
        raise next(
            (e for e in found if not str(e).startswith("another virtual rank failed")), found[0]
        )
    return results, group.traffic


def replicate(module: nn.Module, count: int) -> list[nn.Module]:
    """Copy a module `count` times, with leaf parameters of their own over the same memory.

    Each process has such leaves, too; buffers are shared.
    """
    copies = []
    for _ in range(count):
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for p in module.parameters()
        }
        memo.update({id(b): b for b in module.buffers()})
        copies.append(copy.deepcopy(module, memo))
    return copies
