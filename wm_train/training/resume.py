"""Resume a stage from its own newest checkpoint, or start it from the weights it inherits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_shards.fields import same_rate
from data_shards.weight_files import is_release
from wm_train.checkpoint import store
from wm_train.checkpoint.handover import handover
from wm_train.checkpoint.manifest import Manifest, resume_facts
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT
from wm_train.errors import SetupError
from wm_train.models.public import load_pretrained_
from wm_train.noise import KEYING
from wm_train.training.networks import load_frozen, newest_in, own_name, source_prefix, their_name
from wm_train.training.state import TrainState, identity
from wm_train.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Hold the start of a stage: finished steps, the step guard's memory of them, the last held-out
    loss, and the shards that were left out."""

    steps_done: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    validation_loss: float = math.nan
    quarantined: tuple[str, ...] = ()


def restore(
    plan: StagePlan,
    state: TrainState,
    data_fingerprint: str,
    world: World,
    report: Callable[[str], None],
    fps: float | None = None,
) -> Start:
    """Fill the state from this stage's newest valid checkpoint, or from the stage it inherits;
    return the start. fps: of the stage's clips.

    Errors: SetupError when the checkpoint belongs to another model, data set, seed or batch, or
    when there is nothing to inherit.
    """
    root = plan.checkpoints
    load_frozen(plan, state, world, report)
    newest = store.find_newest(root, world, report, mine=True)
    if newest is None:
        inherit(plan, state, world, report, fps)
        for role, own in state.roles.items():
            if plan.config.roles[role].inherit == STUDENT:
                start_as_student(own, state)
            inherit(plan.of_role(role), own, world, report)
        return Start()
    folder, manifest = newest
    # `resume=false` speaks of the first start of a command: its restarts go on from what it saved
    if not plan.resume and not (plan.command and manifest.facts.get("command") == plan.command):
        raise SetupError(
            f"resume=false: got {folder}, which another command has saved, expected no checkpoint"
            " of an earlier start. Fix: name=<new run>, or move the folder away, or resume=true to"
            " go on from it"
        )
    theirs, their_config = resume_facts(folder, manifest)
    mine = identity(plan, data_fingerprint, state.digests)
    if "noise" not in theirs:
        raise SetupError(
            f"cannot continue {folder}: it was trained with noise keyed by the stage's position, "
            f"got keying 1, expected {KEYING} (by the stage's name). Fix: name=<new run>"
        )
    sides = ((theirs, their_config), (mine, plan.record))
    before, now = (
        {**facts, "data": f"{config['data']['path']} ({facts['data'][:12]})"}
        for facts, config in sides
    )
    different = [
        _difference(key, before.get(key), now[key])
        for key in mine
        if theirs.get(key) != _as_json(mine[key])
    ]
    different += _other_tensors(their_config, plan.record, plan.stage)
    if different:
        raise SetupError(
            f"cannot continue {folder}: {'; '.join(different)}. Fix: restore those values, start a"
            " new run with another name=..."
        )
    held = state.tensors()
    store.load(folder, manifest, held)
    state.put(held)
    report(f"continuing from {folder} after {manifest.step} steps")
    loss = manifest.facts.get("validation_loss")
    left_out = tuple(manifest.facts.get("quarantined", ()))
    return Start(
        manifest.step, manifest.facts.get("guard", {}), math.nan if loss is None else loss, left_out
    )


def inherit(
    plan: StagePlan,
    state: TrainState,
    world: World,
    report: Callable[[str], None],
    fps: float | None = None,
) -> None:
    """Load the weights of the source by name, and its moments if configured; the average starts
    from the weights. fps: of this stage's clips; that of the source's is reported if it differs.

    Errors: SetupError when there is no source, or its names do not match and the stage does not
    declare the difference.
    """
    source, stage = plan.source, plan.config
    if source is None:
        return
    if isinstance(source.checkpoints, Path) and is_release(source.checkpoints):
        _start_from_public(source.checkpoints, state, report)
        return
    where = f"recipe.stages.{plan.stage}.inherit"
    parts = source.parts
    found = [newest_in(part.checkpoints, where, world, report) for part in parts]
    places = ", ".join(str(folder) for folder, _ in found)
    mine, use_average = state.tensors(), stage.inherit_weights == "ema"
    weights, prefix = _below("model/", mine), source_prefix(source)
    stored = [_below(prefix, manifest.tensors) for _, manifest in found]
    names = [
        {name for tensor in held if (name := own_name(tensor, part))}
        for held, part in zip(stored, parts, strict=True)
    ]
    every = frozenset().union(*names)
    held = {name.removeprefix("model/") for name in every if name.startswith("model/")}
    switched = state.model.switched_parameters
    try:
        passed = handover(stage, plan.stage, weights.keys(), held, switched)
    except ValueError as error:
        raise SetupError(f"{error} (source {places})") from error
    assert not (stage.inherit_optimizer and source.others), "checked before the start"
    moments: dict[str, Any] = {}
    if stage.inherit_optimizer:
        moments = _moments(plan.stage, mine, found[0][1], passed.taken)
    averaged = False
    for (folder, manifest), part, here in zip(found, parts, names, strict=True):
        targets = {}
        for name in (n for n in passed.taken if f"model/{n}" in here):
            kind = "ema/" if use_average and f"ema/{name}" in here else "model/"
            averaged = averaged or kind == "ema/"
            targets[prefix + their_name(kind + name, part)] = weights[name]
        store.load(folder, manifest, targets | moments, may_ignore=manifest.tensors)
    state.put({f"model/{name}": weights[name] for name in passed.taken} | moments)
    _restart_average(state)
    changes = (
        f", {len(passed.fresh)} start anew, {len(passed.left)} left behind"
        if passed.fresh or passed.left
        else ""
    )
    with_moments = f", with {len(moments)} tensors of its optimizer" if moments else ""
    theirs = found[0][1].facts.get("fps")
    if fps and isinstance(theirs, float) and not same_rate(fps, theirs):
        report(
            f"stage {plan.stage} has clips of {fps:.4g} frames per second, its source was trained"
            f" on {theirs:.4g}: from latent to latent things move {theirs / fps:.3g} times as far"
        )
    report(
        f"weights from {places} ({'averaged' if averaged else 'as trained'}{changes}{with_moments})"
    )


def _moments(
    stage: str, mine: dict[str, Any], manifest: Manifest, taken: frozenset[str]
) -> dict[str, Any]:
    """Return the optimizer tensors of the inherited weights; those that the source did not train
    start from zero."""
    stored = {name.rpartition("/")[0] for name in manifest.tensors if name.startswith("optimizer/")}
    wanted = {
        name: tensor
        for name, tensor in mine.items()
        if name.startswith("optimizer/")
        and (weight := name.rpartition("/")[0]) in stored
        and weight.removeprefix("optimizer/") in taken
    }
    missing = [name for name in wanted if name not in manifest.tensors]
    if missing or not wanted:
        raise SetupError(
            f"recipe.stages.{stage}.inherit_optimizer: got a source without"
            f" {missing[0] if missing else 'an optimizer'}, expected one that was trained with the"
            f" same optimizer. Fix: recipe.stages.{stage}.inherit_optimizer=false"
        )
    return wanted


def _start_from_public(folder: Path, state: TrainState, report: Callable[[str], None]) -> None:
    """Load the weights of a public directory."""
    if state.zero:
        raise SetupError(
            f"inherit: got a public directory, {folder}, with parallel.sharding=zero3, expected one"
            " of our checkpoints. Fix: parallel.sharding=fsdp for this stage; zero3 goes on from"
            " its checkpoints"
        )
    try:
        loaded = load_pretrained_(state.model, folder)
    except ValueError as error:
        raise SetupError(str(error)) from error
    _restart_average(state)
    report(f"weights from {folder} ({len(loaded.filled)} tensors, {len(loaded.fresh)} new)")


def _below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def start_as_student(state: TrainState, student: TrainState) -> None:
    """Copy the student's first weights into another network of the same parameters."""
    theirs = student.weights()
    with torch.no_grad():
        for name, tensor in state.weights().items():
            tensor.copy_(theirs[name])
    _restart_average(state)


def _restart_average(state: TrainState) -> None:
    for name, tensor in state.weights().items():
        if name in state.ema:
            state.ema[name].copy_(tensor)


def _difference(key: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        inner = [k for k in theirs | mine if theirs.get(k) != _as_json(mine.get(k))]
        return "; ".join(_difference(f"{key}.{k}", theirs.get(k), mine.get(k)) for k in inner)
    return f"{key} was {theirs!r} and is now {mine!r}"


def _other_tensors(theirs: Mapping[str, Any], mine: Mapping[str, Any], stage: str) -> list[str]:
    """Return the settings that give a checkpoint other tensors, of two run configurations: the
    kind of optimizer, and if there is an average."""
    before, now = (_optimizers(config["recipe"]["stages"][stage]) for config in (theirs, mine))
    different = []
    for where in (name for name in before if name in now):
        for key, kind in (("name", str), ("ema_decay", bool)):
            if kind(before[where][key]) != kind(now[where][key]):
                name = f"{where}.{key}"
                different.append(_difference(name, before[where][key], now[where][key]))
    return different


def _optimizers(stage: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the optimizers of a stage's networks, plain, by their keys."""
    roles = stage.get("roles", {})  # of a checkpoint of before there were any
    others = {f"roles.{role}.optimizer": own["optimizer"] for role, own in roles.items()}
    return {"optimizer": stage["optimizer"], **{key: own for key, own in others.items() if own}}


def _as_json(value: Any) -> Any:
    """Return a value as it comes back from the manifest: tuples as lists."""
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value
