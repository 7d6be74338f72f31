"""Share whole-matrix work among the processes that hold the shards: each matrix has one owner.

The owner receives the rows of all others, computes once, and sends every process its own rows of
the result. So a step costs the work of one process instead of that of all, and each element travels
twice, not P times. Rounds of one matrix per owner keep at most two whole matrices in memory; the
rows of the next round travel while a round is computed. Results do not depend on who the owner is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from wm_train.boxes import RowShards

Pair = tuple[Tensor, Tensor]  # a matrix [r, C] and one number for each of its rows [r]


class Work(NamedTuple):
    """Describe what is done with matrix i, between this process's rows and its owner.

    local(i): give this process's rows and their numbers; whole(i, matrix, numbers): compute the
    result from all rows; apply(i, rows, numbers): take this process's rows of the result.
    """

    local: Callable[[int], Pair]
    whole: Callable[[int, Tensor, Tensor], Pair]
    apply: Callable[[int, Tensor, Tensor], None]


class _Flight(NamedTuple):
    """Hold an exchange until it is done; buffer: what is sent, which must live as long."""

    work: dist.Work
    buffer: Tensor
    received: Tensor
    counts: list[int]

    def land(self) -> tuple[Tensor, ...]:
        self.work.wait()
        return self.received.split(self.counts)


def deal(shapes: Sequence[tuple[int, int]], owners: int) -> list[tuple[int | None, ...]]:
    """Deal matrices [R, C] over owners -> rounds, each with the matrix of every owner.

    The costliest first, each to the owner with the least work so far; costs are those of
    Newton-Schulz iterations. A pure function of the shapes, so every process deals alike.
    """
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    lists: list[list[int]] = [[] for _ in range(owners)]
    totals = [0] * owners
    for i in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        least = min(range(owners), key=lambda owner: (totals[owner], owner))
        lists[least].append(i)
        totals[least] += costs[i]
    longest = max(map(len, lists), default=0)
    return [tuple(own[n] if n < len(own) else None for own in lists) for n in range(longest)]


def work_by_owners(shards: Sequence[RowShards], widths: Sequence[int], work: Work) -> None:
    """Run `work` on every matrix; all processes of the group call this with the same matrices.

    shards: how the rows of each are split, over one group; widths: their columns C.
    """
    group, index = shards[0].group, shards[0].place
    if group is None:
        for i in range(len(shards)):
            work.apply(i, *work.whole(i, *work.local(i)))
        return

    def gather(turn: tuple[int | None, ...]) -> _Flight:
        # [r, C] and [r] of each owner's matrix -> those of all processes of one's own
        sent = [None if i is None else work.local(i) for i in turn]
        own = turn[index]
        counts = [0] * len(turn)
        if own is not None:
            counts = [n * (widths[own] + 1) for n in shards[own].rows]
        empty = next(pair[0] for pair in sent if pair is not None).reshape(-1)[:0]
        return _exchange(group, sent, counts, empty)

    def scatter(turn: tuple[int | None, ...], flight: _Flight) -> _Flight:
        # own rows of each owner's result come back: [R, C] and [R] -> [r, C] and [r]
        own, pieces = turn[index], flight.land()
        sent: Sequence[Pair | None] = [None] * len(turn)
        if own is not None:
            rows, width = shards[own].rows, widths[own]
            pairs = [_unpack(flat, n, width) for flat, n in zip(pieces, rows, strict=True)]
            matrix, numbers = (torch.cat(column) for column in zip(*pairs, strict=True))
            result = work.whole(own, matrix, numbers)
            sent = list(zip(*(x.split(list(rows)) for x in result), strict=True))
        counts = [0 if i is None else shards[i].rows[index] * (widths[i] + 1) for i in turn]
        return _exchange(group, sent, counts, flight.received[:0])

    def take(turn: tuple[int | None, ...], flight: _Flight) -> None:
        for i, flat in zip(turn, flight.land(), strict=True):
            if i is not None:
                work.apply(i, *_unpack(flat, shards[i].rows[index], widths[i]))

    turns = deal(
        [(sum(s.rows), c) for s, c in zip(shards, widths, strict=True)], len(shards[0].rows)
    )
    arriving, leaving = gather(turns[0]), None
    for n, turn in enumerate(turns):
        following = gather(turns[n + 1]) if n + 1 < len(turns) else None
        back = scatter(turn, arriving)
        if leaving is not None:
            take(*leaving)
        leaving, arriving = (turn, back), following or arriving
    if leaving is not None:
        take(*leaving)


def _exchange(
    group: dist.ProcessGroup, sent: Sequence[Pair | None], counts: list[int], empty: Tensor
) -> _Flight:
    """Send pair j to process j; counts: the elements that each sends here; empty: a tensor without
    elements, sent where all pairs are None."""
    flat = [torch.cat([x.reshape(-1) for x in pair]) for pair in sent if pair is not None]
    sizes = iter(flat)
    splits = [0 if pair is None else next(sizes).numel() for pair in sent]
    buffer = torch.cat(flat) if flat else empty
    received = buffer.new_empty(sum(counts))
    work = dist.all_to_all_single(received, buffer, counts, splits, group=group, async_op=True)
    return _Flight(work, buffer, received, counts)


def _unpack(flat: Tensor, rows: int, width: int) -> Pair:
    """Return views of a packed pair: [rows, width] and [rows]."""
    return flat[: rows * width].view(rows, width), flat[rows * width :]
