"""What `python -m wm_train.parity` runs: the user's model and objective on seeded clips, on one
device, on virtual ranks or on processes.

The maths does not depend on the picture's size, so the clips are small pictures of the stage's full
length; every second clip is shorter, so that padding is covered as well. All data and noise are
keyed by (seed, name, clip, frame), as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout
from parallel.reference import Kernels
from parallel.sequence import GroupSequence, LocalSequence, SequenceShard
from parallel.streaming import chunk_starts
from parallel.traffic import expected_cost
from parallel.virtual import VirtualComm, replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.config.schema import ModelConfig, ObjectiveConfig
from wm_train.kernels.dispatch import sequence_kernels
from wm_train.models import build_model, use_engine_
from wm_train.models.init import initialise_
from wm_train.noise import PARITY, NoiseKey, normal
from wm_train.objectives import OBJECTIVES

TEXT_TOKENS = 6
WAKE = 0.1  # standard deviation of the noise that replaces zeros of a fresh model


@dataclass(frozen=True)
class ParityCase:
    """Everything a run depends on. frames: latent; grid: latent rows and columns; device: where it
    runs, with that device's kernels."""

    model: ModelConfig
    objective: ObjectiveConfig
    seed: int
    frames: int
    temporal_stride: int
    batch: int
    grid: tuple[int, int]
    double: bool
    chunk_frames: int = 0
    checkpoint: str | None = None
    device: str = "cpu"
    engine: str = "auto"  # of the kernels
    attention: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def kernels(self) -> Kernels:
        return sequence_kernels(torch.device(self.device), self.engine, self.attention)

    @property
    def layout(self) -> ClipLayout:
        """Every second clip is shorter. Chunks are the stage's; a causal model of a stage without
        any gets 4, 3, 3, … latent frames."""
        short = max(1, self.frames - max(1, self.frames // 4))
        valid = tuple(self.frames if row % 2 == 0 else short for row in range(self.batch))
        chunk_frames = self.chunk_frames or (3 if self.model.causal else 0)
        return ClipLayout(
            self.frames, chunk_starts=chunk_starts(self.frames, chunk_frames), valid_frames=valid
        )


@dataclass(frozen=True)
class Clips:
    """A batch for the objective: local latents [B, t, C, h, w], draws [B]."""

    latents: Tensor
    draws: Tensor


@dataclass(frozen=True)
class Outcome:
    """losses [B]; velocity [B, T, C, h, w]; the summed gradient of every parameter that has one."""

    losses: Tensor
    velocity: Tensor
    gradients: dict[str, Tensor]


def make_model(case: ParityCase) -> nn.Module:
    """The model with seeded weights, or those of a checkpoint. Fresh zeros become noise: behind a
    zero gate nothing would be compared."""
    with torch.device("meta"):
        model = build_model(case.model)
    model.to_empty(device="cpu")
    initialise_(model, case.seed)
    if case.checkpoint is not None:
        load_weights(model, Path(case.checkpoint))
    else:
        wake_(model, case.seed)
    use_engine_(model, case.engine)
    return model.to(case.device, case.dtype)


@torch.no_grad()
def wake_(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if parameter.dim() else 1
        key, draw = NoiseKey(seed, PARITY), torch.zeros(1, dtype=torch.int64)
        noise = normal(key, f"parameter/{name}", draw, (0, rows), tuple(parameter.shape[1:]))
        noise = noise.reshape(parameter.shape).to(parameter.dtype) * WAKE
        parameter.copy_(torch.where(parameter == 0, noise, parameter))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Weights of a verified checkpoint directory, by name."""
    from wm_train.checkpoint import store
    from wm_train.world import World

    manifest = store.check(folder, World(rank=0, size=1))
    targets = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    store.load(
        folder,
        manifest,
        targets,
        may_ignore=[name for name in manifest.tensors if not name.startswith("model/")],
    )


def conditions_of(case: ParityCase) -> Conditions:
    """A camera that pans and walks on, another one per clip, at raw-frame rate; text where the
    model reads it."""
    raw = 1 + (case.frames - 1) * case.temporal_stride
    height, width = (side * 16 for side in case.grid)
    steps = (
        torch.arange(raw, dtype=torch.float32)[None] * (1 + torch.arange(case.batch))[:, None] / raw
    )
    c2w = torch.eye(4).repeat(case.batch, raw, 1, 1)
    c2w[..., 0, 0], c2w[..., 0, 2], c2w[..., 2, 0], c2w[..., 2, 2] = (
        steps.cos(),
        steps.sin(),
        -steps.sin(),
        steps.cos(),
    )
    c2w[..., 0, 3], c2w[..., 2, 3] = steps.sin(), steps
    intrinsics = torch.tensor([0.9 * width, 0.9 * width, width / 2, height / 2]).repeat(
        case.batch, raw, 1
    )
    text = mask = None
    if case.model.text_width:
        draws = torch.arange(case.batch)
        text = normal(
            NoiseKey(case.seed, PARITY), "text", draws, (0, TEXT_TOKENS), (case.model.text_width,)
        ).to(case.dtype)
        mask = torch.arange(TEXT_TOKENS)[None] < TEXT_TOKENS - draws[:, None] % 3
    return Conditions.of(
        (height, width), case.temporal_stride, c2w, intrinsics, text=text, text_mask=mask
    )


def latents_of(case: ParityCase) -> Tensor:
    """[B, T, C, h, w]"""
    shape = (case.model.latent_channels, *case.grid)
    return normal(
        NoiseKey(case.seed, PARITY), "latents", torch.arange(case.batch), (0, case.frames), shape
    ).to(case.dtype)


def forward(
    case: ParityCase, model: nn.Module, sequence: SequenceShard, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Losses of the rows [b] and their local velocities [b, t, C, h, w]; traffic is told apart by
    block."""
    seen: list[Tensor] = []
    handles = [
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    ]
    for number, block in enumerate(getattr(model, "blocks", [])):
        handles.append(
            block.register_forward_pre_hook(
                lambda module, inputs, scope=f"blocks.{number}": set_scope(sequence, scope)
            )
        )
        handles.append(
            block.register_forward_hook(lambda module, inputs, output: set_scope(sequence, ""))
        )
    conditions = conditions_of(case)
    held = {name: value[rows].to(case.device) for name, value in conditions.fields.items()}
    conditions = conditions.with_fields(**held)
    latents = latents_of(case)[rows, sequence.frames.start : sequence.frames.stop]
    clips = Clips(latents.to(case.device), torch.arange(case.batch)[rows].to(case.device))
    output = OBJECTIVES[case.objective.name](
        model, clips, NoiseKey(case.seed, PARITY), case.objective, sequence, conditions
    )
    for handle in handles:
        handle.remove()
    return output.loss, seen[-1]


def set_scope(sequence: SequenceShard, scope: str) -> None:
    sequence.comm.scope = scope


def on_one_device(case: ParityCase) -> Outcome:
    model = make_model(case)
    losses, velocity = forward(case, model, LocalSequence(case.layout, case.kernels))
    (losses.sum() / case.batch).backward()
    return Outcome(
        losses.detach(),
        velocity,
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


def on_virtual_ranks(case: ParityCase, ring: int, ulysses: int) -> tuple[Outcome, list[TrafficRow]]:
    """The same over ring x ulysses members in this process, and what they sent."""
    models = replicate(make_model(case), ring * ulysses)
    comms: list[VirtualComm] = []
    kernels = case.kernels

    def body(comm: VirtualComm) -> tuple[Tensor, Tensor]:
        comms.append(comm)
        return forward(
            case, models[comm.members[0].index], GroupSequence(case.layout, comm, kernels)
        )

    results, _ = run_virtual(body, ring, ulysses)
    torch.stack([losses.sum() / case.batch for losses, _ in results]).sum().backward()
    gradients: dict[str, Tensor] = {}
    for model in models:  # in rank order
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = (
                    gradients[name] + parameter.grad
                    if name in gradients
                    else parameter.grad.clone()
                )
    velocity = torch.cat([velocity for _, velocity in results], 1)
    return Outcome(results[0][0].detach(), velocity, gradients), traffic_rows(comms)


@dataclass(frozen=True)
class TrafficRow:
    """One kind of call in one block: counted and expected (collectives, bytes) of the busiest
    member; agree: on every member."""

    label: str
    counted: tuple[int, int]
    expected: tuple[int, int]
    agree: bool


def traffic_rows(comms: list[VirtualComm]) -> list[TrafficRow]:
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


@dataclass(frozen=True)
class Comparison:
    """‖found − reference‖ / ‖reference‖ of one tensor; absolute when the reference is zero."""

    name: str
    size: float
    error: float


def compare(reference: Outcome, found: Outcome) -> list[Comparison]:
    """Loss, velocity and every gradient, in the model's order."""
    pairs: list[tuple[str, Tensor, Tensor | None]] = [
        ("loss", reference.losses, found.losses),
        ("velocity", reference.velocity, found.velocity),
        *(
            (name, gradient, found.gradients.get(name))
            for name, gradient in reference.gradients.items()
        ),
    ]
    pairs += [
        (name, torch.zeros_like(gradient), gradient)
        for name, gradient in found.gradients.items()
        if name not in reference.gradients
    ]
    rows = []
    for name, a, b in pairs:
        size = float(a.double().norm())
        error = math.inf if b is None else float((a.double() - b.double()).norm())
        rows.append(Comparison(name, size, error / size if size > 0 else error))
    return rows


def not_exercised(case: ParityCase, reference: Outcome) -> tuple[list[str], list[str]]:
    """Parameters without any gradient: (those that the model declares unused, the others)."""
    with torch.device("meta"):
        model = build_model(case.model)
    declared: Callable[[], Any] = getattr(model, "unused_parameters", frozenset)
    silent = [
        n
        for n, _ in model.named_parameters()
        if n not in reference.gradients or not bool(reference.gradients[n].any())
    ]
    unused = set(declared())
    return [n for n in silent if n in unused], [n for n in silent if n not in unused]
