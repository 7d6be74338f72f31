"""Predict the seconds of a rank's work from a rehearsal and a hardware profile, operator by
operator.

seconds = max(FLOPs / (rate of its class), bytes / rate of the memory). This is the fidelity "spec":
it knows shapes and data sheets, no measurement of this model, and promises ± 30 %. Work of the host
runs beside the device, so it is a sum of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from wm_train.backends.hardware import Hardware
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.speed.collectives import Call, Lane
from wm_train.plan.speed.network import Network, collective_s, group_of, network_of
from wm_train.plan.tracing import COMMUNICATION, Work

Kind = Literal[
    "product", "attention", "attention backward", "kernel", "convolution", "memory", "none"
]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "linear")
CONVOLUTIONS = ("convolution", "convolution_backward", "_conv_depthwise2d")
# of the optimizer with an average, per own parameter: weight, gradient, both moments and average,
# read and written in fp32
UPDATE_BYTES = 40
FREE = {"lift_fresh", "device", "empty", "empty_strided", "new_empty", "new_empty_strided"}
FREE |= {"empty_like", "_record_function_enter_new", "_record_function_exit"}
FUSED = 0.35  # of the bytes of memory operators, left by compilation; inferred, not measured


@dataclass(frozen=True)
class Seconds:
    """Hold the seconds of one rank's step by what they are spent on.

    device: (phase, class) -> seconds; launched: phase -> seconds of the host; collectives: (phase,
    lane) -> seconds; update: of the optimizer.
    """

    device: dict[tuple[str, Kind], float]
    launched: dict[str, float]
    collectives: dict[tuple[str, Lane], float]
    update: float

    def compute(self, phase: str | None = None) -> float:
        """Return the seconds of the device in one phase, or in all."""
        return sum(s for (own, _), s in self.device.items() if phase in (None, own))


def kind_of(name: str) -> Kind:
    """Return the class of an operator, such as "aten.mm.default", or of a kernel, "triton.…"."""
    space, operator, *_ = name.split(".")
    if space == "triton":
        return "kernel"
    if space in COMMUNICATION[:2] or operator in FREE or space == "prim":
        return "none"
    if "attention" in operator or "flex" in operator:
        return "attention backward" if "backward" in operator else "attention"
    if operator in PRODUCTS:
        return "product"
    return "convolution" if operator in CONVOLUTIONS else "memory"


def operator_s(name: str, work: Work, hardware: Hardware, fused: float = 1.0) -> float:
    """Return the device's seconds of all calls of one operator in one phase.

    fused: share of the bytes of memory operators that are left after compilation.
    """
    kind = kind_of(name)
    if kind == "none":
        return 0.0
    rate = {"attention": hardware.attention, "attention backward": hardware.attention_backward}.get(
        kind, hardware.matmul
    )
    moved = (work.returned + work.read) * (fused if kind == "memory" else 1.0)
    return max(work.flops / rate, moved / hardware.memory_rate)


def seconds_of(made: Rehearsal, hardware: Hardware, compiled: bool = False) -> Seconds:
    """Return the seconds of a rehearsed step. compiled: blocks go through torch.compile."""
    fused = FUSED if compiled else 1.0
    device: dict[tuple[str, Kind], float] = {}
    launched: dict[str, float] = {}
    for (phase, name), work in made.work.items():
        kind, seconds = kind_of(name), operator_s(name, work, hardware, fused)
        if kind == "none":
            continue
        device[phase, kind] = device.get((phase, kind), 0.0) + seconds
        if work.returned or work.read:  # a view launches nothing
            calls = work.calls * (fused if kind == "memory" else 1.0)
            launched[phase] = launched.get(phase, 0.0) + calls * hardware.launch_s
    update = UPDATE_BYTES * own_parameters(made) / hardware.memory_rate
    calls_s = collectives_s(made.collectives.items(), network_of(hardware))
    return Seconds(device, launched, calls_s, update)


def own_parameters(made: Rehearsal) -> float:
    """Return how many trained parameters, in fp32, a rehearsed rank updates itself."""
    return (made.update - made.held) / 2 / 4


def forward_flops(made: Rehearsal) -> int:
    """Return the FLOPs of the forward pass of a rank; those of recomputation are not among them."""
    return sum(work.flops for (phase, _), work in made.work.items() if phase == "activations")


def collectives_s(
    calls: Iterable[tuple[Call, int]], network: Network
) -> dict[tuple[str, Lane], float]:
    """Return the seconds of collectives by phase and lane."""
    total: dict[tuple[str, Lane], float] = {}
    for call, count in calls:
        group = group_of(call.ranks, call.stride, network.node_size)
        seconds = count * collective_s(call.pattern, call.sent, group, network)
        total[call.phase, call.lane] = total.get((call.phase, call.lane), 0.0) + seconds
    return total
