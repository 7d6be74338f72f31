"""Compare the traffic of virtual ranks with the formulas."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.traffic import expected_cost
from parallel.virtual import VirtualComm


@dataclass(frozen=True)
class TrafficRow:
    """Record one kind of call in one block: counted and expected (collectives, bytes) of the
    busiest rank; agree: on every rank."""

    label: str
    counted: tuple[int, int]
    expected: tuple[int, int]
    agree: bool


def traffic_rows(comms: list[VirtualComm]) -> list[TrafficRow]:
    """Return one row per block, verb and direction."""
    pairs: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for comm in comms:
        expected: dict[str, tuple[int, int]] = {}
        for call in comm.calls:
            for way, cost in expected_cost(call.verb, call.tensors, comm.members[0]).items():
                label = (
                    f"{call.scope}/{call.verb.name} {way}"
                    if call.scope
                    else f"{call.verb.name} {way}"
                )
                before = expected.get(label, (0, 0))
                expected[label] = (before[0] + cost.collectives, before[1] + cost.sent)
        for label in expected | comm.traffic.collectives:
            counted = comm.traffic.collectives.get(label, 0), comm.traffic.sent.get(label, 0)
            pairs.setdefault(label, []).append((counted, expected.get(label, (0, 0))))
    return [
        TrafficRow(label, *max(both), all(a == b for a, b in both)) for label, both in pairs.items()
    ]
