"""Define collectives as data, and run the algorithms that yield them.

A verb's algorithm is a generator: it computes locally, yields one request, receives this rank's
answer, and continues. A communicator hosts one or several ranks of a sequence group and drives
their generators in lockstep: `run` is list in, list out. A process group hosts one rank; virtual
ranks (`virtual.py`) host all P of them in one process, through the same generators.

Ranks of a sequence group are numbered along the time axis: index = ring index × ulysses + ulysses
index. A request names the axis it runs over: "sequence" (all P ranks), "ulysses" or "ring".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Axis = str
SavedHooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack and unpack
Program = Generator["Request", Any, Any]


class AllGather(NamedTuple):
    """Gather tensor [*] (same shape on all ranks of the axis) -> list over ranks of [*]."""

    tensor: Tensor
    axis: Axis = "sequence"


class Exchange(NamedTuple):
    """Send the flat parts[j] to rank j of the axis -> list over ranks i of what i sent, flat.

    receive[i]: meta tensors with the shapes and dtype of what rank i sends. All-to-all (even and
    uneven), neighbour exchange and ring shift are all this request; a part without elements is not
    sent.
    """

    parts: Sequence[Tensor]
    receive: Sequence[Sequence[Tensor]]
    axis: Axis = "sequence"


class Begin(NamedTuple):
    """Start an exchange and continue computing -> a ticket for `Finish`."""

    exchange: Exchange


class Finish(NamedTuple):
    """Wait for a started exchange -> its answer."""

    ticket: Any


Request = AllGather | Exchange | Begin | Finish


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one flat buffer, of their common dtype or else of bytes.

    In a buffer of bytes the widest dtype comes first, so that views stay aligned.
    """
    if len({x.dtype for x in tensors}) == 1:
        return torch.cat([x.reshape(-1) for x in tensors])
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    return torch.cat([tensors[i].reshape(-1).contiguous().view(torch.uint8) for i in order])


def unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a `pack` buffer with the shapes and dtypes of `like` (meta tensors)."""
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
    """Locate one rank of a sequence group: its index on each axis, and the lengths of the axes."""

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
    """Count the collectives of one rank and the bytes it sent to *other* ranks.

    Both are keyed by the label "[scope/]verb direction".
    """

    collectives: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)

    def add(self, label: str, count: int) -> None:
        self.collectives[label] = self.collectives.get(label, 0) + 1
        self.sent[label] = self.sent.get(label, 0) + count


def sent_bytes(request: AllGather | Exchange, member: Member) -> int:
    """Return the bytes that a rank sends to other ranks for one request."""
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
    """Store collective results of a checkpointed forward pass, to replay them in backward.

    whole: names of verbs whose results and kept tensors are stored instead of their collective
    answers, so that a replay does not compute them again either. hooks: pack and unpack each
    tensor, as those on saved tensors do that move them to the host; None: they stay as they are.
    """

    answers: list[Any] = field(default_factory=list)
    replaying: bool = False
    cursor: int = 0
    whole: frozenset[str] = frozenset()
    hooks: SavedHooks | None = None

    def keep(self, answer: Any) -> None:
        """Store what the next call in order returned."""
        if self.hooks:
            pack = self.hooks[0]
            answer = _each(answer, Tensor, lambda tensor: _Packed(pack(tensor)))
        self.answers.append(answer)

    def next(self) -> Any:
        """Return what the next call in order returned."""
        self.cursor += 1
        answer = self.answers[self.cursor - 1]
        if self.hooks:
            unpack = self.hooks[1]
            answer = _each(answer, _Packed, lambda packed: unpack(packed.value))
        return answer


@dataclass(frozen=True)
class _Packed:
    """Hold what a hook made of a tensor."""

    value: Any


def _each(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return lists and tuples with the values of a kind in them changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_each(one, kind, change) for one in value)
    return value


class Verb(Protocol):
    """Describe one of the verbs with all its static facts.

    The facts are equal on every rank, so two calls can be compared to prove that ranks agree.
    """

    name: str

    def forward(self, member: Member, *tensors: Tensor | None) -> Program:
        """Yield requests, then return (outputs, kept, facts).

        outputs are differentiable; kept (tensors) and facts (plain values) are what backward needs.
        """
        ...

    def backward(
        self,
        member: Member,
        kept: tuple[Tensor | None, ...],
        facts: Any,
        grads: tuple[Tensor | None, ...],
    ) -> Program:
        """Yield requests, then return one gradient or None per input tensor of `forward`."""
        ...


class Communicator(Protocol):
    """Run verbs for the ranks of one sequence group that live in this process.

    scope: a prefix of the traffic labels (a layer's name, for instance); calls made while it is set
    count under it, and so do their backward passes. joined: several ranks share one graph node,
    which then stores its tensors itself, because hooks on saved tensors belong to one rank's
    thread.
    """

    members: tuple[Member, ...]
    joined: bool
    scope: str
    tape: Tape | None

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Run a verb as one differentiable operation, from this rank's view."""
        ...

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        """Run one program per hosted rank to its end and return their results in rank order."""
        ...


class SoloComm:
    """Run verbs on one device: a single rank that never needs a collective."""

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
    """Return a context without autocast, because the verbs choose their own precision.

    Meta tensors have no autocast; for them the context does nothing.
    """
    return (
        torch.autocast(device_type, enabled=False)
        if torch.amp.is_autocast_available(device_type)
        else nullcontext()
    )


class _Phases(torch.autograd.Function):
    """Make one graph node per verb call, whatever the number of hosted ranks.

    Its backward runs the verb's backward phases.
    """

    @staticmethod
    def forward(
        ctx: Any, comm: Communicator, verb: Verb, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.label = f"{comm.scope}/{verb.name}" if comm.scope else verb.name
        ctx.comm, ctx.verb, ctx.count = comm, verb, len(tensors) // len(comm.members)
        device = next(x.device.type for x in tensors if x is not None)
        # tensors: those of the first hosted rank, then those of the next
        with exact_arithmetic(device):
            own = ctx.count
            programs = [
                verb.forward(m, *tensors[i * own : (i + 1) * own])
                for i, m in enumerate(comm.members)
            ]
            results = _run_once(comm, verb, f"{ctx.label} forward", programs, tensors)
        ctx.kept_counts = [len(kept) for _, kept, _ in results]
        ctx.facts = [facts for *_, facts in results]
        kept = [x for _, group, _ in results for x in group]
        # Hooks on saved tensors (checkpointing) belong to the thread of one rank.
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


def _run_once(
    comm: Communicator,
    verb: Verb,
    label: str,
    programs: list[Program],
    inputs: Sequence[Tensor | None],
) -> list[Any]:
    """Run the forward programs of one verb, or take their results from the tape.

    A kept tensor that is an input is stored as its place: the second run has computed it anew.
    """
    tape = comm.tape
    if tape is None or verb.name not in tape.whole:
        return comm.run(label, programs)
    if tape.replaying:
        ((outputs, kept, facts),) = tape.next()
        again = tuple(inputs[x] if isinstance(x, int) else x for x in kept)
        return [(tuple(x.detach() for x in outputs), again, facts)]
    comm.tape = None  # what its collectives answer is not stored
    try:
        results = comm.run(label, programs)
    finally:
        comm.tape = tape
    ((outputs, kept, facts),) = results  # ranks that share a process replay answers
    places = {id(x): i for i, x in enumerate(inputs) if x is not None}
    stored = tuple(places.get(id(x), x if x is None else x.detach()) for x in kept)
    tape.keep([(tuple(x.detach() for x in outputs), stored, facts)])
    return results


def apply(comm: Communicator, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Run a verb for all hosted ranks as one differentiable operation.

    tensors and outputs are concatenated over ranks: all of the first rank, then all of the next.
    """
    return _Phases.apply(comm, verb, *tensors)
