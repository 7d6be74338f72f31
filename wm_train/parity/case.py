"""Build and run the parity cases: the user's model and objective on seeded clips, on one device, on
virtual ranks or on processes.

The maths does not depend on the picture's size, so the clips are small pictures of the stage's full
length; every second clip is shorter, so that padding is covered as well. All data and noise are
keyed by (seed, name, clip, frame), as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from parallel.layout import ClipLayout
from parallel.reference import Kernels
from parallel.sequence import GroupSequence, LocalSequence, SequenceShard, WholeClip
from parallel.streaming import chunk_starts
from parallel.virtual import VirtualComm, replicate, run_virtual
from wm_train.config.kinds import ModelConfig, ObjectiveConfig
from wm_train.config.registry import builder
from wm_train.kernels.dispatch import sequence_kernels
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.init import initialise_
from wm_train.models.spec import WorldModel, build_model
from wm_train.noise import PARITY, NoiseKey, normal
from wm_train.objectives.clips import Clips
from wm_train.parity.compare import Outcome
from wm_train.parity.traffic import TrafficRow, traffic_rows

WAKE = 0.1  # standard deviation of the noise that replaces zeros of a fresh model


@dataclass(frozen=True)
class ParityCase:
    """Hold the complete description of a run. frames: latent; grid: latent rows and columns;
    device: where it runs, with that device's kernels."""

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
    grouped: bool = False  # every latent has `temporal_stride` raw frames, also the first
    exchange: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def kernels(self) -> Kernels:
        return sequence_kernels(torch.device(self.device), self.engine, self.attention)

    @property
    def shape(self) -> ExampleShape:
        grid, stride = self.grid, self.temporal_stride
        return ExampleShape(self.batch, self.frames, *grid, stride, grouped=self.grouped)

    @property
    def layout(self) -> ClipLayout:
        """Return a layout whose every second clip is shorter. Chunks are the stage's; a causal
        model of a stage without any gets 4, 3, 3, … latent frames."""
        short = max(1, self.frames - max(1, self.frames // 4))
        valid = tuple(self.frames if row % 2 == 0 else short for row in range(self.batch))
        chunk_frames = self.chunk_frames or (3 if self.model.needs().causal else 0)
        return ClipLayout(
            self.frames, chunk_starts=chunk_starts(self.frames, chunk_frames), valid_frames=valid
        )


def make_model(case: ParityCase) -> WorldModel:
    """Make the model with seeded weights, or those of a checkpoint. Zeros of a fresh model become
    noise, as a zero gate would hide the rest from the comparison."""
    with torch.device("meta"):
        model = build_model(case.model)
    model.to_empty(device="cpu")
    initialise_(model, case.seed)
    if case.checkpoint is not None:
        load_weights(model, Path(case.checkpoint))
    else:
        wake_(model, case.seed)
    model.use_kernels(case.engine)
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
    """Load the weights of a verified checkpoint directory, by name."""
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


def forward(
    case: ParityCase, model: WorldModel, sequence: WholeClip, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Compute losses of the rows [b] and their local velocities [b, t, C, h, w]; traffic is counted
    per block."""
    seen: list[Tensor] = []
    handles = [
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    ]
    for number, unit in enumerate(model.units()):
        handles.append(
            unit.register_forward_pre_hook(
                lambda module, inputs, scope=f"blocks.{number}": set_scope(sequence, scope)
            )
        )
        handles.append(
            unit.register_forward_hook(lambda module, inputs, output: set_scope(sequence, ""))
        )
    conditions = example_conditions(case.model.needs(), case.shape, case.seed)
    held = {name: value[rows].to(case.device) for name, value in conditions.fields.items()}
    if "text" in held:
        held["text"] = held["text"].to(case.dtype)
    conditions = conditions.with_fields(**held)
    latents = example_latents(case.model.needs(), case.shape, case.seed).to(case.dtype)
    latents = latents[rows, sequence.frames.start : sequence.frames.stop]
    draws = torch.arange(case.batch)[rows].to(case.device)
    key = NoiseKey(case.seed, PARITY)
    clips = Clips(latents.to(case.device), draws, conditions, sequence, key)
    output = builder(case.objective)(model, clips, case.objective)
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
    """Run the case over ring x ulysses virtual ranks in this process; return the outcome and
    traffic."""
    models = [cast(WorldModel, m) for m in replicate(make_model(case), ring * ulysses)]
    comms: list[VirtualComm] = []
    kernels = case.kernels

    def body(comm: VirtualComm) -> tuple[Tensor, Tensor]:
        comms.append(comm)
        return forward(
            case,
            models[comm.members[0].index],
            GroupSequence(case.layout, comm, kernels, exchange=case.exchange),
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


def not_exercised(case: ParityCase, reference: Outcome) -> tuple[list[str], list[str]]:
    """Return the parameters without any gradient: (those that the model declares unused, the
    others)."""
    with torch.device("meta"):
        model = build_model(case.model)
    silent = [
        n
        for n, _ in model.named_parameters()
        if n not in reference.gradients or not bool(reference.gradients[n].any())
    ]
    unused = model.unused_parameters()
    return [n for n in silent if n in unused], [n for n in silent if n not in unused]
