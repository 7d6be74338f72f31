"""Run verbs over real processes, one rank each, with torch.distributed (any back end).

Only two collectives are used: all-gather, and all-to-all with given sizes; a neighbour exchange and
a ring shift are all-to-alls whose other parts are empty. So point-to-point messages never mix with
collectives on one communicator (a known source of hangs), and sums are computed here in rank order,
never by the back end. The groups should be dedicated to sequence parallelism: collectives of
parameter sharding on the same group would race with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.comm import (
    AllGather,
    Begin,
    Exchange,
    Finish,
    Member,
    Program,
    Request,
    Tape,
    Traffic,
    Verb,
    apply,
    sent_bytes,
)
from parallel.timing import CommClock


class ProcessGroupComm:
    """Run the verbs of this process's rank over its process groups.

    groups: those of the axes "sequence" (all P, in rank order), "ulysses" and "ring".
    """

    joined = False

    def __init__(self, member: Member, groups: dict[str, ProcessGroup]) -> None:
        assert dist.get_world_size(groups["sequence"]) == member.size
        self.members: tuple[Member, ...] = (member,)
        self.traffic = Traffic()
        self.tape: Tape | None = None
        self.scope = ""
        self.clock: CommClock | None = None  # set to measure the time in collectives
        self._groups = groups

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return apply(self, verb, *tensors)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors [*] in place from the first rank of the sequence group. No gradient."""
        for tensor in tensors:
            dist.broadcast(tensor, group=self._groups["sequence"], group_src=0)

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of an axis that has more than one rank."""
        return self._groups[axis]

    def run(self, label: str, programs: list[Program]) -> list[Any]:
        (program,) = programs
        tape = self.tape if label.endswith("forward") else None
        answer: Any = None
        while True:
            try:
                request = program.send(answer)
            except StopIteration as done:
                return [done.value]
            if tape is not None and tape.replaying:
                answer = None if isinstance(request, Begin) else tape.next()
                continue
            mark = self.clock.mark() if self.clock else None
            answer = self._carry_out(request, label)
            if self.clock:
                self.clock.since(mark)
            if tape is not None and not isinstance(request, Begin):
                tape.keep(answer)

    def _carry_out(self, request: Request, label: str) -> Any:
        if isinstance(request, Finish):
            return request.ticket.wait()
        collective = request.exchange if isinstance(request, Begin) else request
        self.traffic.add(label, sent_bytes(collective, self.members[0]))
        if isinstance(collective, AllGather):
            return self._gather(collective)
        ticket = self._exchange(collective)
        return ticket if isinstance(request, Begin) else ticket.wait()

    def _gather(self, request: AllGather) -> list[Tensor]:
        """Gather [*] -> list over ranks of [*]."""
        group = self._groups[request.axis]
        mine = request.tensor.contiguous()
        out = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(out, mine, group=group)
        return out

    def _exchange(self, request: Exchange) -> _Ticket:
        """Send parts[j], flat, to rank j -> what rank i sent, flat."""
        send = [part.numel() for part in request.parts]
        dtype = request.parts[0].dtype
        wide = dtype.itemsize
        receive = [
            sum(x.numel() * x.element_size() for x in like) // wide for like in request.receive
        ]
        buffer = torch.cat([part.reshape(part.numel()) for part in request.parts])
        out = torch.empty(sum(receive), dtype=dtype, device=buffer.device)
        work = dist.all_to_all_single(
            out, buffer, receive, send, group=self._groups[request.axis], async_op=True
        )
        return _Ticket(work, buffer, out, receive)


class _Ticket(NamedTuple):
    """Hold an exchange in flight and its buffers until it is done."""

    work: dist.Work
    buffer: Tensor
    out: Tensor
    receive: list[int]

    def wait(self) -> Sequence[Tensor]:
        self.work.wait()
        return self.out.split(self.receive)
