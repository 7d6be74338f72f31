"""What training changes: the sharded model, its optimizer and its average; how it is made, saved, continued and handed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.sharding import shard_model
from wm_train import checkpoint
from wm_train.config import RunConfig
from wm_train.curriculum import source_of, stage_directory
from wm_train.models import build_model
from wm_train.models.init import initialise_
from wm_train.models.pretrained import load_pretrained_
from wm_train.models.public_layout import stage_parts
from wm_train.optim.adamw import Optimizer, optimizer_tensors
from wm_train.optim.build import OPTIMIZERS
from wm_train.optim.ema import ema_start
from wm_train.tracking import public_config
from wm_train.world import World


class SetupError(ValueError):
    """The user's mistake, found before the first step. Nothing was changed."""


@dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint holds, under the names it holds it by. `ema` is empty when the stage keeps no average."""

    model: nn.Module
    optimizer: Optimizer
    ema: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """model/<name>, ema/<name>, optimizer/<name>/<slot>: the live tensors."""
        return (
            _prefixed("model/", self.weights())
            | _prefixed("ema/", self.ema)
            | _prefixed("optimizer/", optimizer_tensors(self.model, self.optimizer))
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def build_state(run: RunConfig, mesh: DeviceMesh, device: torch.device) -> TrainState:
    """Model on meta, sharded, then filled: no process ever holds all of it. Weights come from the seed and each parameter's name."""
    with torch.device("meta"):
        model = build_model(run.model)
    shard_model(model, model.get_submodule("blocks").children(), mesh, run.parallel.precision)
    model.to_empty(device=device)
    initialise_(model, run.seed)
    config = run.recipe.stages[run.stage].optimizer
    return TrainState(model, OPTIMIZERS[config.name](model, config), ema_start(model) if config.ema_decay else {})


def identity(run: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """What must be equal for a run to continue: it decides the samples, their noise and the function that is trained."""
    stage = run.recipe.stages[run.stage]
    return {
        "stage": run.stage,
        "seed": run.seed,
        "frames": stage.frames,
        "global_batch": stage.global_batch,
        "model": asdict(run.model),
        "objective": asdict(stage.objective),
        "data": data_fingerprint,
    }


def facts(run: RunConfig, data_fingerprint: str, world: World, guard: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself besides its tensors."""
    return {
        "identity": identity(run, data_fingerprint),
        "config": public_config(run),
        "world": world.size,
        "guard": guard,
    }


@dataclass(frozen=True)
class Start:
    """Where a stage begins: steps that are done already, and what the step guard remembers of them."""

    steps_done: int = 0
    guard: dict[str, Any] = field(default_factory=dict)


def restore(run: RunConfig, state: TrainState, data_fingerprint: str, world: World, report: Callable[[str], None]) -> Start:
    """Fill the state from this stage's newest valid checkpoint, or from the stage it inherits; returns where to begin.

    Errors: SetupError when the checkpoint belongs to another model, data set, seed or batch, or when there is nothing to inherit.
    """
    root = stage_directory(run, run.stage) / "checkpoints"
    found = checkpoint.find_newest(root, world, report) if run.resume else None
    if found is None:
        _inherit(run, state, world, report)
        return Start()
    folder, manifest = found
    mine, theirs = identity(run, data_fingerprint), manifest.facts["identity"]
    different = [_difference(key, theirs.get(key), mine[key]) for key in mine if theirs.get(key) != _as_json(mine[key])]
    if different:
        raise SetupError(
            f"cannot continue {folder}: {'; '.join(different)}. Fix: restore those values, start a new run with another name=..., or set "
            f"resume=false with an empty run directory"
        )
    checkpoint.load(folder, manifest, state.tensors())
    report(f"continuing from {folder} after {manifest.step} steps")
    return Start(manifest.step, manifest.facts.get("guard", {}))


def _inherit(run: RunConfig, state: TrainState, world: World, report: Callable[[str], None]) -> None:
    """Take the weights of the stage before, by name; the optimizer starts fresh and the average starts from them."""
    source = source_of(run, run.stage)
    if source is None:
        return
    if (source.checkpoints / "config.json").is_file():
        _start_from_public(source.checkpoints, state, report)
        return
    found = checkpoint.find_newest(source.checkpoints, world, report)
    if found is None:
        raise SetupError(
            f"stage {run.stage} inherits weights: got no valid checkpoint in {source.checkpoints}, expected one. "
            f"Fix: train that stage first, or set recipe.stages.{run.stage}.inherit to a checkpoints directory"
        )
    folder, manifest = found
    use_average = run.recipe.stages[run.stage].inherit_weights == "ema"
    averaged = {n.removeprefix("ema/") for n in manifest.tensors if use_average and n.startswith("ema/")}
    held = {n.removeprefix("model/") for n in manifest.tensors if n.startswith("model/")}
    added = set(stage_parts(state.weights().keys() - held))  # by a stage that adds a branch: they start as initialised
    removed = {f"model/{name}" for name in stage_parts(held - state.weights().keys())}
    weights = {("ema/" if n in averaged else "model/") + n: tensor for n, tensor in state.weights().items() if n not in added}
    unused = [n for n in manifest.tensors if not n.startswith("model/") or n.removeprefix("model/") in averaged or n in removed]
    checkpoint.load(folder, manifest, weights, may_ignore=unused)
    _restart_average(state)
    changes = f", {len(added)} new tensors, {len(removed)} left behind" if added or removed else ""
    report(f"weights from {folder} ({'averaged' if averaged else 'as trained'}{changes})")


def _start_from_public(folder: Path, state: TrainState, report: Callable[[str], None]) -> None:
    """Take the weights of a diffusers directory (SANA-WM, or SANA-Video as a start)."""
    try:
        loaded = load_pretrained_(state.model, folder)
    except ValueError as error:
        raise SetupError(str(error)) from error
    _restart_average(state)
    report(f"weights from {folder} ({len(loaded.filled)} tensors, {len(loaded.fresh)} new)")


def _restart_average(state: TrainState) -> None:
    for name, tensor in state.weights().items():
        if name in state.ema:
            state.ema[name].copy_(tensor)


def _difference(key: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        inner = [k for k in mine if theirs.get(k) != _as_json(mine[k])]
        return "; ".join(_difference(f"{key}.{k}", theirs.get(k), mine[k]) for k in inner)
    return f"{key} was {theirs!r} and is now {mine!r}"


def _as_json(value: Any) -> Any:
    """What a value looks like after it went through the manifest (tuples come back as lists)."""
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value
