"""Build the networks of a stage by role: a student, and beside it critics that train and teachers
that do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from data_shards.weight_files import is_release
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import CheckpointError, Manifest
from wm_train.config.curriculum import Part, Source, StagePlan
from wm_train.config.roles import STUDENT
from wm_train.errors import SetupError
from wm_train.models.public import load_pretrained_
from wm_train.models.spec import WorldModel
from wm_train.storage import Place
from wm_train.training.state import EvaluationState, TrainState, build_for_evaluation, build_state
from wm_train.world import World

Report = Callable[[str], None]


def build_networks(
    plan: StagePlan, mesh: DeviceMesh, device: torch.device, filled: bool = True
) -> TrainState:
    """Build the student's state, with the other networks of the stage in it; those that do not
    train are empty until `load_frozen`. filled: as for `build_state`."""
    state = build_state(plan, mesh, device, filled)
    trained, frozen = {}, {}
    for role, own in plan.config.roles.items():
        if own.optimizer:
            trained[role] = build_state(plan.of_role(role), mesh, device, filled)
        else:
            frozen[role] = build_for_evaluation(plan.of_role(role), mesh, device, filled).model
    return replace(state, roles=trained, frozen=frozen)


def load_frozen(plan: StagePlan, state: TrainState, world: World, report: Report) -> None:
    """Fill the networks that do not train from their sources, and note the digests of their
    weights.

    They are in no checkpoint, so every start reads them; the digests tell if they are the same.
    Errors: SetupError when there is no source, or its parameters are not the network's.
    """
    for role, model in state.frozen.items():
        where = f"recipe.stages.{plan.stage}.roles.{role}.inherit"
        found = find_weights(plan.of_role(role), model, where, world, report)
        load_weights_(model, found, where)
        state.digests[role] = found.digest
        report(f"{role}: weights from {', '.join(str(place) for place in found.places)}")


@dataclass(frozen=True)
class FoundPart:
    """Locate weights in a checkpoint of ours, or, without `manifest`, in a diffusers directory.
    targets: the network's tensors by their names there."""

    place: Place
    manifest: Manifest | None
    targets: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FoundWeights:
    """Locate the weights of a network in one or several places; digest: of these and the names."""

    parts: Sequence[FoundPart]
    digest: str

    @property
    def places(self) -> list[Place]:
        """Return the folders, of checkpoints those of their step."""
        return [part.place for part in self.parts]


def find_weights(
    own: StagePlan, model: WorldModel, where: str, world: World, report: Report
) -> FoundWeights:
    """Find the newest weights in the source of a plan. where: the key of that source.

    Every rank must call this. Raises SetupError when there are none.
    """
    assert own.source is not None, "checked before the start: a frozen network has a source"
    place = own.source.checkpoints
    if isinstance(place, Path) and is_release(place):
        digest = world.from_first(_files_digest(place) if not world.rank else "")
        return FoundWeights([FoundPart(place, None, {})], digest)
    averaged, parts, digests = own.config.inherit_weights == "ema", [], []
    for part in own.source.parts:
        folder, manifest = newest_in(part.checkpoints, where, world, report)
        targets = _targets(EvaluationState(model), manifest, own.source, part, averaged)
        parts.append(FoundPart(folder, manifest, targets))
        digests.append(_digest(manifest, sorted(targets)))
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode())
    return FoundWeights(parts, whole if isinstance(whole, str) else whole.hexdigest())


def newest_in(place: Place, where: str, world: World, report: Report) -> tuple[Place, Manifest]:
    """Return the newest valid checkpoint in a place. where: the key that names it. Raises
    SetupError when there is none."""
    newest = store.find_newest(place, world, report)
    if newest is None:
        raise SetupError(
            f"{where}: got no valid checkpoint in {place}, expected one. Fix: train that stage"
            " first, or give a checkpoints directory"
        )
    return newest


def load_weights_(model: WorldModel, found: FoundWeights, where: str) -> None:
    """Fill a network with the weights that were found. Raises SetupError when its parameters are
    not theirs."""
    try:
        for part in found.parts:
            if part.manifest is None:
                assert isinstance(part.place, Path), "a diffusers directory is a local one"
                try:
                    load_pretrained_(model, part.place)
                except ValueError as error:
                    raise SetupError(f"{where}: {error}") from error
            else:
                store.load(part.place, part.manifest, dict(part.targets), part.manifest.tensors)
    except CheckpointError as error:
        raise SetupError(f"{where}: {error}") from error


def source_prefix(source: Source) -> str:
    """Return the part of tensor names that stands before those of the source's role."""
    return "" if source.role == STUDENT else f"{source.role}/"


def _targets(
    state: EvaluationState, manifest: Manifest, source: Source, part: Part, averaged: bool
) -> dict[str, torch.Tensor]:
    """Return the network's weights in a part of its source by their names there: averaged ones if
    there are any and they are wanted."""
    prefix = source_prefix(source)
    stored = {name.removeprefix(prefix) for name in manifest.tensors if name.startswith(prefix)}
    kept = {name for name in stored if averaged or not name.startswith("ema/")}
    here = {own_name(name, part) for name in kept} - {None}
    held = state.sources({name for name in here if name}).items()
    return {
        prefix + their_name(name, part): tensor
        for name, tensor in held
        if name.partition("/")[2].startswith(part.mine)
    }


def own_name(stored: str, part: Part) -> str | None:
    """Return the name here of a tensor of a part, "model/high.blocks.0" of "model/blocks.0"; None
    for one that is not of it."""
    kind, _, name = stored.partition("/")
    return f"{kind}/{part.mine}{name[len(part.theirs) :]}" if name.startswith(part.theirs) else None


def their_name(here: str, part: Part) -> str:
    """Return the name of a tensor in the part that it is taken from."""
    kind, _, name = here.partition("/")
    return f"{kind}/{part.theirs}{name[len(part.mine) :]}"


def _digest(manifest: Manifest, names: list[str]) -> str:
    """Return a hash of the files of a checkpoint and of the tensors that were taken from it."""
    files = {name: facts["sha256"] for name, facts in manifest.files.items()}
    return hashlib.sha256(json.dumps([files, names], sort_keys=True).encode()).hexdigest()


def _files_digest(folder: Path) -> str:
    """Return a hash of the weights in a diffusers directory."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
