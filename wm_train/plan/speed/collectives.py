"""Note a collective as the network sees it: pattern, bytes that this rank sends, group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wm_train.plan.speed.network import Pattern

Lane = Literal["gather", "reduce", "sequence"]


class Call(NamedTuple):
    """Describe one collective of a rank: bytes that it sends to others, ranks of the group and
    their distance in the order of all ranks.

    lane: "gather" and "reduce" of weights and gradients, which run beside the computation, or
    "sequence", for whose answer it waits.
    """

    phase: str
    lane: Lane
    pattern: Pattern
    sent: int
    ranks: int
    stride: int


def call_of(phase: str, name: str, args: Any) -> Call | None:
    """Return the collective of an operator of torch's group of processes; None for one that moves
    no data. Raises ValueError for an operator that is not known here.

    name: such as "_allgather_base_".
    """
    if name in ("barrier", "monitored_barrier_"):
        return None
    ranks = _group(args)
    own, size = ranks.index(dist.get_rank()), len(ranks)
    stride = ranks[1] - ranks[0] if size > 1 else 1
    if name == "alltoall_base_":
        parts = args[4] or [args[1].shape[0] // size] * size  # rows to each rank
        row = _bytes([args[1]]) // max(1, args[1].shape[0])
        others = [rows for rank, rows in enumerate(parts) if rank != own and rows]
        # one or two neighbours: a ring's shift or a halo
        pattern: Pattern = "shift" if len(others) <= min(2, size - 2) else "all_to_all"
        return Call(phase, "sequence", pattern, sum(others) * row, size, stride)
    if name == "allgather_":
        return Call(phase, "sequence", "gather", _bytes(args[1]) * (size - 1), size, stride)
    if name == "_allgather_base_":
        return Call(phase, "gather", "gather", _bytes([args[1]]) * (size - 1), size, stride)
    if name == "_reduce_scatter_base_":
        return Call(phase, "reduce", "reduce", _bytes([args[0]]) * (size - 1), size, stride)
    if name in ("allreduce_", "allreduce_coalesced_"):
        sent = 2 * _bytes(args[0]) * (size - 1) // size
        return Call(phase, "reduce", "all_reduce", sent, size, stride)
    if name == "broadcast_":
        return Call(phase, "sequence", "shift", _bytes(args[0]), size, stride)
    raise ValueError(f"collective of a rehearsal: got {name}, expected one that is known")


def gloo_copies(name: str, args: Any) -> int:
    """Return the bytes that gloo, the group of hosts, allocates inside an operator: a copy of what
    it reduces and scatters, and one of all that it gathers. Others work on their arguments."""
    if name == "_reduce_scatter_base_":
        return _bytes([args[1]])
    if name == "_allgather_base_":
        return _bytes([args[0]])
    return _bytes(part for parts in args[0] for part in parts) if name == "allgather_" else 0


def _group(args: Iterable[Any]) -> list[int]:
    """Return the ranks of the group among an operator's arguments."""
    for one in args:
        if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type()):
            return list(dist.get_process_group_ranks(dist.ProcessGroup.unbox(one)))
    raise ValueError("collective of a rehearsal: got no group, expected one among its arguments")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
