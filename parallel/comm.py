"""Collectives as data, and the communicators that carry them out.

A verb's algorithm is a generator: it computes locally, yields one request, gets this member's
answer, and goes on. A communicator hosts one or several members of a sequence group and drives
their generators in lockstep: `run` is list in, list out. A process group hosts one member; virtual
ranks (`virtual.py`) host all P of them in one process, through the same generators.

Members are numbered along the time axis: member = ring index × ulysses + ulysses index. A request
names the axis it runs over: "sequence" (all P members), "ulysses" or "ring".
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Axis = str
Program = Generator["Request", Any, Any]


class AllGather(NamedTuple):
    """tensor [*] (same shape on all members of the axis) -> list over members of [*]"""

    tensor: Tensor
    axis: Axis = "sequence"


class Exchange(NamedTuple):
    """All-to-all of unequal parts: the flat parts[j] goes to member j of the axis; -> list over
    members i of what i sent, flat.

    receive[i]: meta tensors that say what i sends (shapes and dtype). Even and uneven all-to-all,
    neighbour exchange and ring shift are all this; a part without elements is not sent.
    """

    parts: Sequence[Tensor]
    receive: Sequence[Sequence[Tensor]]
    axis: Axis = "sequence"


class Begin(NamedTuple):
    """Start an exchange and go on computing -> a ticket for `Finish`."""

    exchange: Exchange


class Finish(NamedTuple):
    """Wait for a begun exchange -> its answer."""

    ticket: Any


Request = AllGather | Exchange | Begin | Finish


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors -> one flat buffer; of their common dtype, else of bytes (widest dtype first,
    so that views stay aligned)."""
    if len({x.dtype for x in tensors}) == 1:
        return torch.cat([x.reshape(-1) for x in tensors])
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    return torch.cat([tensors[i].reshape(-1).contiguous().view(torch.uint8) for i in order])


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `pack`: views of `flat` with the shapes and dtypes of `like` (meta
    tensors)."""
    same = len({x.dtype for x in like}) == 1
    if not same and flat.data_ptr() % 8:
        flat = flat.clone()  # views of wider dtypes need an aligned start
    order = (
        range(len(like))
        if same
        else sorted(range(len(like)), key=lambda i: -like[i].element_size())
    )
    out: list[Tensor] = [flat] * len(like)
    cursor = 0
    for i in order:
        count = like[i].numel() * (1 if same else like[i].element_size())
        out[i] = flat[cursor : cursor + count].view(like[i].dtype).reshape(like[i].shape)
        cursor += count
    assert cursor == flat.numel(), (cursor, flat.numel())
    return out


@dataclass(frozen=True)
class Member:
    """Who a program runs for: its place on each axis and the axis lengths."""

    ring_index: int = 0
    ulysses_index: int = 0
    ring: int = 1
    ulysses: int = 1

    @property
    def index(self) -> int:
        return self.ring_index * self.ulysses + self.ulysses_index

    @property
    def size(self) -> int:
        return self.ring * self.ulysses


@dataclass
class Traffic:
    """What one member has sent: collectives and bytes to *other* members, by label "[scope/]verb
    direction"."""

    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)

    def add(self, label: str, count: int) -> None:
        self.collectives[label] = self.collectives.get(label, 0) + 1
        self.sent[label] = self.sent.get(label, 0) + count


def sent_bytes(request: AllGather | Exchange, member: Member) -> int:
    """Bytes that a member sends to others for one request."""
    index, length = {
        "sequence": (member.index, member.size),
        "ulysses": (member.ulysses_index, member.ulysses),
        "ring": (member.ring_index, member.ring),
    }[request.axis]
    if isinstance(request, AllGather):
        return request.tensor.numel() * request.tensor.element_size() * (length - 1)
    return sum(
        part.numel() * part.element_size() for j, part in enumerate(request.parts) if j != index
    )


@dataclass
class Tape:
    """Results of collectives, kept by a checkpointed forward pass and played back when it is run
    again in backward."""

    answers: list[Any] = field(default_factory=list)
    replaying: bool = False
    cursor: int = 0

    def next(self) -> Any:
        self.cursor += 1
        return self.answers[self.cursor - 1]


class Verb(Protocol):
    """One of the four verbs with all its static facts: equal on every member, and therefore safe to
    compare."""

    name: str

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        """-> (outputs, kept, facts): differentiable outputs; the tensors and the plain values that
        backward needs."""
        ...

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        """-> one gradient or None per input tensor of `forward`"""
        ...


class Communicator(Protocol):
    """Hosts members of one sequence group.

    scope: set by whoever wants traffic told apart, by layer for instance; calls made meanwhile
    count under it, their backward too. joined: several members share one graph node, which then
    keeps its tensors itself: hooks on saved tensors belong to one member's thread.
    """

    members: tuple[Member, ...]
    joined: bool
    scope: str
    tape: Tape | None

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run a verb as one differentiable operation, from this member's view."""
        ...

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        """Drive one program per hosted member to its end and return their results in member
        order."""
        ...


class SoloComm:
    """The one-device case: a single member that never needs a collective."""

    members: tuple[Member, ...] = (Member(),)
    joined = False
    scope = ""
    tape: Tape | None = None

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return apply(self, verb, *tensors)

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        assert len(programs) == 1
        try:
            next(programs[0])
        except StopIteration as done:
            return [done.value]
        raise AssertionError(f"{label} asked for a collective on one device")


def exact_arithmetic(device_type: str) -> AbstractContextManager[None]:
    """Autocast off: the verbs choose their own precision. (Shape-only tensors know no autocast.)"""
    return (
        torch.autocast(device_type, enabled=False)
        if torch.amp.is_autocast_available(device_type)
        else nullcontext()
    )


class _Phases(torch.autograd.Function):
    """One graph node per verb call, whatever the number of hosted members; its backward runs the
    verb's backward phases."""

    @staticmethod
    def forward(
        ctx: Any, comm: Communicator, verb: Verb, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.label = f"{comm.scope}/{verb.name}" if comm.scope else verb.name
        ctx.comm, ctx.verb, ctx.count = comm, verb, len(tensors) // len(comm.members)
        device = next(x.device.type for x in tensors if x is not None)
        with exact_arithmetic(device):
            own = ctx.count
            programs = [
                verb.forward(m, *tensors[i * own : (i + 1) * own])
                for i, m in enumerate(comm.members)
            ]
            results = comm.run(f"{ctx.label} forward", programs)
        ctx.kept_counts = [len(kept) for _, kept, _ in results]
        ctx.facts = [facts for *_, facts in results]
        kept = [x for _, group, _ in results for x in group]
        if comm.joined:
            ctx.kept = [None if x is None else x.detach() for x in kept]
        else:
            ctx.save_for_backward(*kept)
        ctx.device = device
        return tuple(x for outputs, *_ in results for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        members, saved = ctx.comm.members, list(ctx.kept if ctx.comm.joined else ctx.saved_tensors)
        width, programs = len(grads) // len(members), []
        with exact_arithmetic(ctx.device):
            for i, member in enumerate(members):
                kept = tuple(saved.pop(0) for _ in range(ctx.kept_counts[i]))
                programs.append(
                    ctx.verb.backward(
                        member, kept, ctx.facts[i], grads[i * width : (i + 1) * width]
                    )
                )
            results = ctx.comm.run(f"{ctx.label} backward", programs)
        return (None, None, *(grad for result in results for grad in result))


def apply(comm: Communicator, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Run a verb for all hosted members as one differentiable operation. tensors, outputs: the
    members' one after the other."""
    return _Phases.apply(comm, verb, *tensors)
