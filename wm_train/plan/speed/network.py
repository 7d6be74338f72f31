"""Predict the seconds of a collective from the bytes that a rank sends and where its group lies.

    seconds = base + steps inside x step + steps across x step + ramp √bytes + bytes / rate

A link has a latency for each step of a ring, a rate, and a ramp: pipelining fills slowly, so that
medium sizes are slower than latency and rate tell. On the published tables of
`benchmarks/collective_model.py` it matters where many ranks share a switch. All numbers come from a
hardware profile or from a measurement, see `fit_link`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Literal

import numpy as np

from wm_train.backends.hardware import Hardware

Pattern = Literal["gather", "reduce", "all_reduce", "all_to_all", "shift"]


@dataclass(frozen=True)
class Link:
    """Describe one level of a network for one device: seconds of a ring's step, seconds per root of
    a byte, bytes per second one way."""

    step_s: float
    ramp_s: float
    rate: float


@dataclass(frozen=True)
class Network:
    """Describe the links inside a node and, for each device, out of it. base_s: seconds that a call
    takes beside its steps, on the host and on the device."""

    node_size: int
    base_s: float
    inside: Link
    across: Link


@dataclass(frozen=True)
class Group:
    """Describe the ranks of a collective: how many, and on how many nodes they lie evenly."""

    ranks: int
    nodes: int = 1


def network_of(hardware: Hardware) -> Network:
    """Return the network model of a profile. It has no ramp: nobody publishes one per link."""
    inside = Link(hardware.inside_step_s, 0.0, hardware.inside)
    across = Link(hardware.across_step_s, 0.0, hardware.across)
    return Network(hardware.node_devices, hardware.base_s, inside, across)


def group_of(ranks: int, stride: int, node_size: int) -> Group:
    """Return the group of `ranks` ranks that are `stride` apart in the order of all ranks."""
    on_a_node = max(1, min(ranks, node_size // stride)) if stride < node_size else 1
    return Group(ranks, -(-ranks // on_a_node))


def collective_s(pattern: Pattern, sent: float, group: Group, network: Network) -> float:
    """Return the seconds of one collective in which each rank sends `sent` bytes in all.

    Rings (gather, reduce, all_reduce, shift) pass every byte from neighbour to neighbour: one flow
    leaves a node per flow that runs inside it, over the links of all devices of the group there.
    In all_to_all each rank sends to every other itself, so bytes for other nodes leave over its own
    link at the same time as those for its node.
    """
    if group.ranks < 2:
        return 0.0
    hops = {"all_reduce": 2 * (group.ranks - 1), "shift": 1, "all_to_all": group.ranks - 1}
    steps = hops.get(pattern, group.ranks - 1)
    outside = min(steps, {"all_reduce": 2, "all_to_all": 1}.get(pattern, 1) * (group.nodes - 1))
    here = group.ranks / group.nodes  # ranks of the group on one node
    inside, across = network.inside, network.across
    if pattern == "all_to_all":
        outside = steps - round(here) + 1 if group.nodes > 1 else 0
        far = sent * (group.ranks - here) / (group.ranks - 1)
        moving = max((sent - far) / inside.rate, far / across.rate)
    elif group.nodes > 1:
        far = sent
        flow = here * across.rate  # of the one ring, over the links of all ranks on the node
        moving = sent / (min(inside.rate, flow) if here > 1 else across.rate)
    else:
        far, moving = 0.0, sent / inside.rate
    ramp = across.ramp_s * sqrt(far) if group.nodes > 1 else inside.ramp_s * sqrt(sent)
    latency = (steps - outside) * inside.step_s + outside * across.step_s
    return network.base_s + latency + ramp + moving


def fit_link(
    sizes: Sequence[float], seconds: Sequence[float], with_ramp: bool = True
) -> tuple[float, float, float]:
    """Return (latency, ramp, rate) of t = latency + ramp √n + n / rate, by least squares of the
    relative error with no negative part.

    sizes: bytes n; seconds: measured. Raises ValueError for fewer rows than unknowns.
    """
    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    terms = np.stack([np.ones_like(n), np.sqrt(n), n], 1) / t[:, None]
    used = (0, 1, 2) if with_ramp else (0, 2)
    if len(t) < len(used):
        raise ValueError(
            f"measured sizes of a collective: got {len(t)}, expected at least {len(used)}."
            " Fix: measure more sizes"
        )
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(3))
    for count in range(
        1, len(used) + 1
    ):  # seven subsets at most: each is tried, none can be negative
        for subset in combinations(used, count):
            found, *_ = np.linalg.lstsq(terms[:, subset], np.ones_like(t), rcond=None)
            values = np.zeros(3)
            values[list(subset)] = found
            error = float(np.square(terms @ values - 1).sum())
            if (found >= 0).all() and error < best[0]:
                best = (error, values)
    latency, ramp, slope = best[1]
    return float(latency), float(ramp), float(1 / slope) if slope else float("inf")


def predicted_s(link: tuple[float, float, float], size: float) -> float:
    """Return the seconds of `size` bytes over a link that `fit_link` returned."""
    latency, ramp, rate = link
    return latency + ramp * sqrt(size) + size / rate
