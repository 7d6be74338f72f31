"""Build the training state: the sharded model, its optimizer and its average, as checkpoints store
it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from parallel.sharding import PRECISIONS, compile_blocks, shard_model
from wm_train.boxes import is_first_copy, local_tensor
from wm_train.checkpoint.handover import match_names
from wm_train.compat import units_left_out
from wm_train.config.curriculum import StagePlan
from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import builder
from wm_train.config.roles import STUDENT
from wm_train.errors import SetupError
from wm_train.models.init import initialise_, reset_buffers_
from wm_train.models.spec import WorldModel, build_model
from wm_train.noise import KEYING
from wm_train.optim.adamw import Optimizer, adamw_groups, optimizer_tensors
from wm_train.optim.config import AdamWConfig
from wm_train.optim.ema import ema_start, ema_update, ema_weights
from wm_train.redact import clean_value
from wm_train.world import World

if TYPE_CHECKING:
    from parallel.zero import Zero3


# keys of `distill` that change no bit of what is trained
JUDGING = ("gate", "gate_std", "gate_motion", "history_states", "rollouts")


@dataclass(frozen=True)
class TrainState:
    """Hold the content of a checkpoint under its names. `ema` is empty when the stage keeps no
    average.

    With FSDP2 the live tensors are DTensors sharded by row (plain tensors on one fp32 process).
    With ZeRO-3 (`zero`) they are flat shards, and `tensors` are copies sharded by row.

    In a stage of several networks this is the student's; roles: the other trained ones, whose names
    have the role before them (critic/model/<name>); frozen: those that are neither trained nor
    saved; digests: of their weights, filled in as these are loaded.
    """

    model: WorldModel
    optimizer: Optimizer
    ema: dict[str, Tensor]
    zero: Zero3 | None = None
    roles: Mapping[str, TrainState] = field(default_factory=dict)
    frozen: Mapping[str, WorldModel] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def of(self, role: str) -> TrainState:
        """Return the state of a trained network by its role."""
        return self if role == STUDENT else self.roles[role]

    def networks(self) -> dict[str, nn.Module]:
        """Return the modules to call, by role."""
        trained = {role: state.network for role, state in self.roles.items()}
        return {STUDENT: self.network, **trained, **self.frozen}

    def tensors(self) -> dict[str, Tensor]:
        """Return model/<name>, ema/<name>, optimizer/<name>/<slot>, whole or sharded by row, of all
        trained networks. Every rank must call this."""
        if self.zero is not None:
            return dict(self.saved())
        named = self._named(self.weights(), optimizer_tensors(self.model, self.optimizer))
        for role, state in self.roles.items():
            named |= _prefixed(f"{role}/", state.tensors())
        return named

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the pairs of `tensors`, for reading: with ZeRO-3 one by one, as row copies are on
        the device. Every rank must take all pairs."""
        if self.zero is None:
            yield from self.tensors().items()
            return
        for key, flat in self._named(self.weights(), self.zero.moments()).items():
            yield (
                key,
                self.zero.rows(flat, self.zero.shape(key.split("/")[1])) if flat.dim() else flat,
            )

    def put(self, changed: dict[str, Tensor]) -> None:
        """Write changed values of `tensors` back into the state. Every rank must call this."""
        if self.zero is None:
            return
        weights, moments = self.weights(), self.zero.moments()
        flat = self._named(weights, moments)
        for key, tensor in changed.items():
            if flat[key].dim():
                self.zero.fill(flat[key], tensor)
        self.zero.write(weights, moments)

    def _named(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
        return (
            _prefixed("model/", weights)
            | _prefixed("ema/", self.ema)
            | _prefixed("optimizer/", moments)
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name: live, or copies of what is on a disk (ZeRO-3 with nvme)."""
        return (
            self.zero.weights()
            if self.zero
            else {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights inside this context."""
        weights = self.weights()
        with ema_weights(
            self.ema, weights, partial(self.zero.write, weights) if self.zero else None
        ):
            yield

    def update_average(self, decay: float, step: int) -> None:
        """Update the average after step `step` (from 0)."""
        if self.ema:
            ema_update(self.ema, self.weights(), decay, step)

    @property
    def network(self) -> nn.Module:
        """Return the module to call in training; without gradients, use `model`."""
        return self.zero.engine if self.zero else self.model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one micro-batch; `last`: of this step."""
        if self.zero:
            self.zero.backward(loss, last)
        else:
            loss.backward()

    def backward_pieces(self, pieces: Iterable[Tensor], count: int, factor: float) -> None:
        """Add the gradients of one micro-batch whose loss comes in `count` pieces, each times
        `factor`. Shards are reduced once, after the last piece."""
        assert self.zero is None, "checked before the start: zero3 holds one network"
        backward_pieces(self.model, pieces, count, factor)

    def gradients(self, rank: int) -> list[Tensor]:
        """Return this rank's shards of all gradients; of replicated ones, only those of the first
        copy."""
        if self.zero:
            return self.zero.gradients()
        return [
            local_tensor(p.grad)
            for p in self.model.parameters()
            if p.grad is not None and is_first_copy(p, rank)
        ]

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        if self.zero:
            self.zero.scale_gradients(factor)
        else:
            torch._foreach_mul_(
                [local_tensor(p.grad) for p in self.model.parameters() if p.grad is not None],
                factor,
            )


def backward_pieces(model: nn.Module, pieces: Iterable[Tensor], count: int, factor: float) -> None:
    """Add the gradients of these pieces one by one, as they are taken; arguments as for
    `TrainState`'s."""
    for number, piece in enumerate(pieces, 1):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == count)
        with units_left_out():
            (piece * factor).backward()


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def build_state(
    plan: StagePlan, mesh: DeviceMesh, device: torch.device, filled: bool = True
) -> TrainState:
    """Build the model, sharded before it is filled, so that no rank ever holds all of it. Weights
    come from the seed and each parameter's name; filled=False leaves them as they are, for a
    rehearsal on tensors without storage."""
    config = plan.config.optimizer
    if plan.config.parallel.sharding == "zero3":
        assert isinstance(config, AdamWConfig), "checked before the start: on_zero3()"
        return _build_zero3(plan, config, mesh)
    with torch.device("meta" if filled else device):
        model = build_model(plan.config.model)
    prepare(model, plan)
    _shard_empty(model, plan, mesh, device)
    if filled:
        initialise_(model, plan.seed)
    state = TrainState(model, builder(config)(model, config), {})
    return replace(state, ema=ema_start(model, state.weights())) if config.ema_decay else state


def _shard_empty(
    model: WorldModel, plan: StagePlan, mesh: DeviceMesh, device: torch.device
) -> None:
    """Shard a model; if it is on meta, give this rank's shards empty storage, on the host with
    offload."""
    units = list(model.units())
    offload = plan.config.parallel.offload_state != "none"
    if plan.config.parallel.compile:
        compile_blocks(units)
    precision = plan.config.parallel.precision
    shard_model(model, units, mesh, precision, offload, model.exact_units())
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=torch.device("cpu") if offload else device)


@dataclass(frozen=True)
class EvaluationState:
    """Hold a sharded model for evaluation, without optimizer, moments or average."""

    model: WorldModel

    def sources(self, stored: Collection[str]) -> dict[str, Tensor]:
        """Return the weights by their names in `stored`: `ema/<name>` if it is there, else
        `model/`."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        averaged = {name for name in weights if f"ema/{name}" in stored}
        return {("ema/" if n in averaged else "model/") + n: value for n, value in weights.items()}

    def averaged(self) -> AbstractContextManager[None]:
        """Return an empty context, as the loaded weights are already the averaged ones."""
        return nullcontext()


def build_for_evaluation(
    plan: StagePlan, mesh: DeviceMesh, device: torch.device, filled: bool = True
) -> EvaluationState:
    """Return a model that does not train, with empty weights, sharded by FSDP2, also of a ZeRO-3
    run.

    Weights are stored in `parallel.precision`, to which FSDP2 would round them before each use.
    filled: as for `build_state`. Errors: those of `reset_buffers_`.
    """
    with torch.device("meta" if filled else device):
        model = build_model(plan.config.model)
    model.use_kernels(plan.backend.kernels)
    model.requires_grad_(False)
    exact = {id(p) for unit in model.exact_units() for p in unit.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(PRECISIONS[plan.config.parallel.precision])
    _shard_empty(model, plan, mesh, device)
    reset_buffers_(model)
    return EvaluationState(model)


def _build_zero3(plan: StagePlan, config: AdamWConfig, mesh: DeviceMesh) -> TrainState:
    """Build the state under DeepSpeed. Raises SetupError when it is not installed or cannot offload
    as configured."""
    from parallel.zero import Zero3, building, check, zero_config

    try:
        check(plan.config.parallel.offload_state, plan.config.parallel.nvme_path)
        settings = zero_config(
            plan.config.parallel.precision, plan.config.parallel.offload_state, _own_folder(plan)
        )
        with building(settings):
            model = build_model(plan.config.model)
        prepare(model, plan)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = adamw_groups(trained, config, dims=_whole_dimensions)
        zero = Zero3(
            model,
            torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps),
            mesh,
            settings,
        )
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"sharding with zero3 failed: {error}") from error
    first: dict[str, Tensor] = {name: zero.empty_rows(zero.shape(name)) for name in zero.weights()}
    initialise_(model, plan.seed, first)
    state = TrainState(model, zero, {}, zero)
    state.put(_prefixed("model/", first))
    return replace(state, ema=ema_start(model, state.weights())) if config.ema_decay else state


def _whole_dimensions(parameter: Any) -> int:
    """Return the dimensions of the whole tensor that DeepSpeed has flattened and sharded."""
    return len(parameter.ds_shape)


def _own_folder(plan: StagePlan) -> str | None:
    """Return this stage's own folder below `nvme_path`, which several runs may share."""
    given = plan.config.parallel.nvme_path
    return given and str(Path(given) / str(plan.directory.absolute()).strip("/").replace("/", "-"))


def prepare(model: WorldModel, plan: StagePlan) -> None:
    """Choose the configured kernels, and freeze what the stage does not train. Errors: those of
    `freeze`."""
    model.use_kernels(plan.backend.kernels)
    freeze(model, plan)


def freeze(model: nn.Module, plan: StagePlan) -> None:
    """Freeze the parameters that the stage does not train. Raises SetupError for a pattern that
    covers none, or if no parameter is left to train."""
    parameters, where = dict(model.named_parameters()), f"recipe.stages.{plan.stage}.frozen"
    patterns = plan.config.frozen
    try:
        for name in match_names(patterns, parameters.keys(), where):
            parameters[name].requires_grad_(False)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise SetupError(
            f"{where}: got {list(patterns)}, which covers every parameter, expected some to train."
            " Fix: take one out"
        )


def identity(
    plan: StagePlan, data_fingerprint: str, frozen: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the settings that must be equal for a run to resume: they determine the samples, their
    noise and the trained function. frozen: digests of the weights of networks that are not saved,
    by role."""
    stage = plan.config
    settings: dict[str, Any] = {
        "stage": plan.stage,
        "noise": {"stage": plan.stage, "keying": KEYING},
        "seed": plan.seed,
        "frames": stage.frames,
        "global_batch": stage.global_batch,
        "chunk_frames": stage.chunk_frames,
        "model": _model_facts(stage.model),
        "objective": asdict(stage.objective),
        "frozen": list(stage.frozen),
        "data": data_fingerprint,
    }
    if stage.distill:
        settings["turns"] = stage.turns
        settings["distill"] = _without(asdict(stage.distill), *JUDGING)
        settings["roles"] = {
            role: {
                "model": _model_facts(own.model),
                "chunk_frames": own.chunk_frames,
                "weights": (frozen or {}).get(role, "saved with the run"),
            }
            for role, own in stage.roles.items()
        }
    return clean_value(settings)  # it is stored with checkpoints, which others may read


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    """Return a model's keys but for the one that moves memory and no bit of the result."""
    return _without(asdict(model), "activation_checkpointing")


def _without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}


def facts(
    plan: StagePlan,
    data_fingerprint: str,
    world: World,
    guard: dict[str, Any],
    validation_loss: float | None,
    quarantined: tuple[str, ...] = (),
    fps: float | None = None,
    frozen: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the facts of a checkpoint besides its tensors. validation_loss: of this very step,
    None if there was none. The position in the data is the step; with it go only the quarantined
    shards. fps: of the clips, which a stage that inherits compares with its own; frozen: as for
    `identity`."""
    return {
        "validation_loss": validation_loss,
        "identity": identity(plan, data_fingerprint, frozen),
        "config": plan.record,
        "command": plan.command,
        "world": world.size,
        "guard": guard,
        "quarantined": list(quarantined),
        "fps": fps,
    }
