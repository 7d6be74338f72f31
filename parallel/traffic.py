"""Predict the collectives and bytes of each verb call, from integers alone.

The parity command compares counted traffic with this. Bytes are those that one rank sends to other
ranks (its own part of a collective is free). The formulas are written independently of the
algorithms; `parallel/README.md` lists them.
"""

from __future__ import annotations

from math import prod

from parallel.attend import AttendVerb
from parallel.attend_cost import Cost, Shapes, attend_cost
from parallel.clip_mean import MeanVerb
from parallel.comm import Member, Verb
from parallel.gather import GatherVerb
from parallel.gdn_scan import ScanVerb
from parallel.halo import HaloVerb
from parallel.local_attention import accumulation_dtype
from parallel.transpose import TransposeVerb


def expected_cost(verb: Verb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return {"forward": …, "backward": …}, the cost of one call by one rank.

    tensors: shapes and dtypes of its inputs.
    """
    if member.size == 1:
        return {}  # nobody to send to
    if isinstance(verb, ScanVerb):
        return scan_cost(verb, tensors, member)
    if isinstance(verb, HaloVerb):
        return halo_cost(verb, tensors, member)
    if isinstance(verb, GatherVerb):
        return gather_cost(verb, tensors, member)
    if isinstance(verb, TransposeVerb):
        return transpose_cost(verb, tensors, member)
    if isinstance(verb, AttendVerb):
        return attend_cost(verb, tensors, member)
    assert isinstance(verb, MeanVerb), verb
    (shape, dtype), _ = tensors
    return {
        "forward": Cost(1, 2 * shape[0] * accumulation_dtype(dtype).itemsize * (member.size - 1))
    }


def scan_cost(verb: ScanVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return the cost of a scan, in numbers sent to each of P − 1 other ranks.

    Forward Σ B·H·(D² + w·E·D), backward Σ B·H·w·E·D; w = 2 directions or 1, one more in backward
    when continued.
    """
    ways = 1 if verb.reverse is None else 2
    forward = backward = 0
    for (b, _, h, e, d), dtype in tensors[2 : 3 * verb.streams : 3]:
        width = accumulation_dtype(dtype).itemsize
        forward += b * h * (d * d + ways * e * d) * width
        backward += b * h * (ways + verb.continued) * e * d * width
    return {
        "forward": Cost(1, forward * (member.size - 1)),
        "backward": Cost(1, backward * (member.size - 1)),
    }


def halo_cost(verb: HaloVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return the cost of a halo exchange.

    Forward one copy of each local frame per other rank whose halo contains it; backward one
    gradient per received frame.
    """
    held = [range(r.start, r.stop) for r in verb.layout.split(member.size)]
    frame = sum(shape[0] * prod(shape[2:]) * dtype.itemsize for shape, dtype in tensors)

    def wants(q: int, frame_index: int) -> bool:
        return (
            len(held[q]) > 0
            and held[q].start - verb.before <= frame_index < held[q].stop + verb.after
        )

    others = [q for q in range(member.size) if q != member.index]
    sent = sum(wants(q, i) for q in others for i in held[member.index])
    received = sum(wants(member.index, i) for q in others for i in held[q])
    return {"forward": Cost(1, sent * frame), "backward": Cost(1, received * frame)}


def gather_cost(verb: GatherVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return the cost of a gather: own frames to each other rank; backward theirs to each."""
    held = [len(r) for r in verb.layout.split(member.size)]
    frame = sum(shape[0] * prod(shape[2:]) * dtype.itemsize for shape, dtype in tensors)
    mine, others = held[member.index], verb.layout.frames - held[member.index]
    return {
        "forward": Cost(1, mine * frame * (member.size - 1)),
        "backward": Cost(1, others * frame),
    }


def transpose_cost(verb: TransposeVerb, tensors: Shapes, member: Member) -> dict[str, Cost]:
    """Return the cost of turning clips into frames: frames of others of own clips there, own frames
    of others' clips back."""
    ((shape, dtype),) = tensors
    mine = len(verb.layout.split(member.size)[member.index])
    clips = shape[0] // member.size if verb.back else shape[0]
    frame = clips * prod(shape[2:]) * dtype.itemsize
    there = Cost(1, (verb.layout.frames - mine) * frame)
    back = Cost(1, mine * (member.size - 1) * frame)
    ways = (back, there) if verb.back else (there, back)
    return dict(zip(("forward", "backward"), ways, strict=True))
