"""Count FLOPs and traffic of a forward pass by kind of block: by the verbs and masks that it calls.

The real model runs over a whole clip on tensors without storage while its verb calls are recorded.
What a rank of a sequence group sends for such a call is a formula of integers
(`parallel/traffic.py`), with the exchange that attention would choose on that mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from parallel.attend import AttendVerb
from parallel.attend_cost import cheaper_exchange
from parallel.comm import Member, SoloComm, Verb
from parallel.degrees import sequence_degrees
from parallel.layout import ClipLayout
from parallel.masks import AttentionMask
from parallel.sequence import GroupSequence
from parallel.sharding import PRECISIONS
from parallel.streaming import chunk_starts
from parallel.traffic import expected_cost
from parallel.virtual import Call
from wm_train.compat import FakeTensorMode
from wm_train.config.kinds import ModelConfig
from wm_train.config.schema import StageConfig
from wm_train.models.examples import ExampleShape, example_conditions
from wm_train.models.flops import OPERATORS
from wm_train.models.spec import build_model
from wm_train.plan.latents import TEXT_TOKENS

MIB = 2**20
WAYS = ("forward", "backward")


@dataclass(frozen=True)
class BlockKind:
    """Hold the work of all blocks that call the same verbs, for one clip.

    name: those verbs; blocks: how many there are; flops: of their forward passes together; sent:
    bytes that the busiest rank sends in one of them, forward and backward.
    """

    name: str
    blocks: int
    flops: int
    sent: tuple[int, int]


@dataclass(frozen=True)
class GroupMesh:
    """Describe a sequence group, how its attention exchanges, and what it computes in."""

    ring: int = 1
    ulysses: int = 1
    exchange: str = "auto"
    precision: str = "fp32"

    def members(self) -> list[Member]:
        return [
            Member(r, u, self.ring, self.ulysses)
            for r in range(self.ring)
            for u in range(self.ulysses)
        ]


class _Recorder(SoloComm):
    """Run verbs on one device, and record their calls under the scope of the block."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def apply(self, verb: Verb, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in tensors if x is not None)
        self.calls.append(Call(self.scope, verb, shapes))
        return super().apply(verb, *tensors)


def block_kinds(
    model: ModelConfig, shape: ExampleShape, mesh: GroupMesh, chunk_frames: int = 0
) -> list[BlockKind]:
    """Return the kinds of blocks in the order of the model, for one clip of `shape` in chunks of
    `chunk_frames` (0: one chunk)."""
    calls, flops = recorded(model, shape, chunk_frames)
    scopes = {str(i): [call for call in calls if call.scope == str(i)] for i in range(len(flops))}
    found: dict[str, BlockKind] = {}
    for scope, own in scopes.items():
        used = [on_mesh(call, mesh) for call in own]
        name = ", ".join(dict.fromkeys(words(call.verb, mesh) for call in used)) or "no verbs"
        sent = busiest(used, mesh)
        before = found.get(name, BlockKind(name, 0, 0, sent))
        most = (max(before.sent[0], sent[0]), max(before.sent[1], sent[1]))
        found[name] = BlockKind(name, before.blocks + 1, before.flops + flops[int(scope)], most)
    return list(found.values())


def block_lines(
    stage: StageConfig, frames: int, sides: tuple[int, int, int], grouped: bool
) -> list[str]:
    """Return a line for each kind of block of the stage's model, for one clip of `frames` latent
    frames; sides: rows and columns of a latent, and raw frames per latent."""
    parallel, needs = stage.parallel, stage.model.needs()
    ring, ulysses = sequence_degrees(parallel, needs.heads, needs.key_heads)
    mesh = GroupMesh(ring, ulysses, parallel.attention_exchange, parallel.precision)
    shape = ExampleShape(1, frames, *sides, TEXT_TOKENS, grouped)
    lines = ["  forward pass of a clip, by kind of block:"]
    for kind in block_kinds(stage.model, shape, mesh, stage.chunk_frames):
        line = f"    {kind.blocks} x {kind.name}: {kind.flops / 1e12:.3g} TFLOP"
        if ring * ulysses > 1:
            forward, backward = (size / MIB for size in kind.sent)
            line += (
                f"; the busiest process sends {forward:.1f} MiB in each, backward {backward:.1f}"
            )
        lines.append(line)
    return lines


def recorded(
    model: ModelConfig, shape: ExampleShape, chunk_frames: int
) -> tuple[list[Call], list[int]]:
    """Return the verb calls of a forward pass, their scope the number of the block, and each
    block's FLOPs."""
    layout = ClipLayout(shape.frames, chunk_starts=chunk_starts(shape.frames, chunk_frames))
    counter = FlopCounterMode(display=False, custom_mapping=OPERATORS)
    comm, flops, before = _Recorder(), list[int](), list[int]()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        built = build_model(model)
        built.use_kernels("reference")

        def enter(unit: nn.Module, inputs: object) -> None:
            comm.scope = str(len(flops))
            before.append(counter.get_total_flops())

        def leave(unit: nn.Module, inputs: object, output: object) -> None:
            comm.scope = ""
            flops.append(counter.get_total_flops() - before.pop())

        for unit in built.units():
            unit.register_forward_pre_hook(enter)
            unit.register_forward_hook(leave)
        sizes = (shape.batch, shape.frames, model.latent_channels, shape.height, shape.width)
        latents, sigma = torch.empty(sizes), torch.empty(sizes[:2])
        with counter:
            conditions = example_conditions(model.needs(), shape, seed=0)
            built(latents, sigma, conditions, GroupSequence(layout, comm))
    return comm.calls, flops


def on_mesh(call: Call, mesh: GroupMesh) -> Call:
    """Return a call as the mesh would make it: in its compute type, attention by its exchange."""
    dtype, verb = PRECISIONS[mesh.precision], call.verb
    if isinstance(verb, AttendVerb):
        chosen = mesh.exchange
        if chosen == "auto":
            chosen = cheaper_exchange(verb, dtype, mesh.ring, mesh.ulysses)
        verb = replace(verb, exchange=chosen)
    return Call(call.scope, verb, tuple((shape, dtype) for shape, _ in call.tensors))


def busiest(calls: Sequence[Call], mesh: GroupMesh) -> tuple[int, int]:
    """Return the bytes that the busiest rank sends in these calls, forward and backward."""
    totals = [[0, 0] for _ in mesh.members()]
    for call in calls:
        for total, member in zip(totals, mesh.members(), strict=True):
            for way, cost in expected_cost(call.verb, call.tensors, member).items():
                total[WAYS.index(way)] += cost.sent
    return max(a for a, _ in totals), max(b for _, b in totals)


def words(verb: Verb, mesh: GroupMesh) -> str:
    """Return a verb in words: its name; of attention also the mask, and the exchange of a group."""
    if not isinstance(verb, AttendVerb):
        return verb.name
    plain = AttentionMask()
    set_keys = (
        f"{field.name} {getattr(verb.mask, field.name)}"
        for field in fields(verb.mask)[1:]
        if getattr(verb.mask, field.name) != getattr(plain, field.name)
    )
    by = f" by {verb.exchange}" if mesh.ring * mesh.ulysses > 1 else ""
    return " ".join(("attend", verb.mask.causality, *set_keys)) + by
