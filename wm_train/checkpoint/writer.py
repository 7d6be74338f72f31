"""Write checkpoints and delete old ones: `copy` and `commit` of the protocol in `store.py`."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wm_train.boxes import Box, is_first_copy, local_box, local_tensor
from wm_train.checkpoint.manifest import (
    BAD,
    NAME,
    STEP_FOLDER,
    CheckpointError,
    Manifest,
    Part,
    TensorEntry,
    committed,
    read_manifest,
    step_of,
    to_text,
)
from wm_train.checkpoint.tensor_file import DTYPES, sync_folder, write_tensors, write_text
from wm_train.storage import Place, Remote
from wm_train.world import World


class HostCopy(NamedTuple):
    """Hold the part of a state that one rank writes, on the host, and the shape of the whole
    state."""

    mine: dict[str, torch.Tensor]
    boxes: dict[str, Box]
    shapes: dict[str, tuple[torch.dtype, list[int]]]


def copy_to_host(
    tensors: Iterable[tuple[str, torch.Tensor]],
    rank: int,
    kept: dict[str, torch.Tensor] | None = None,
) -> HostCopy:
    """Copy this rank's boxes of plain tensors and DTensors to the host, releasing each original.
    With `kept`, copy into its buffers, made at the first call, so that training may go on while
    they are written; without, use host tensors as they are."""
    mine, boxes, shapes = {}, {}, {}
    for name, tensor in tensors:
        box, shapes[name] = local_box(tensor), (tensor.dtype, list(tensor.shape))
        if is_first_copy(tensor, rank) and not box.empty:
            boxes[name], local = box, local_tensor(tensor).detach()
            if kept is None:
                mine[name] = local.cpu()
            else:
                mine[name] = kept.setdefault(
                    name, torch.empty(local.shape, dtype=local.dtype)
                ).copy_(local)
    return HostCopy(mine, boxes, shapes)


def save(
    root: Place,
    step: int,
    stage: str,
    tensors: Mapping[str, torch.Tensor],
    facts: dict[str, Any],
    world: World,
) -> Place:
    """Write the state after `step` finished steps and publish it, now; see `commit`."""
    return commit(root, step, stage, copy_to_host(tensors.items(), world.rank), facts, world)


def commit(
    root: Place, step: int, stage: str, state: HostCopy, facts: dict[str, Any], world: World
) -> Place:
    """Write and publish a state; return its folder on every rank. A step that is committed already
    is left as it is.

    Errors: CheckpointError on all ranks when any rank could not write; committed checkpoints are
    untouched.
    """
    final, draft = _names(root, step, world)
    if draft is None:
        return final
    part, problem = None, None
    try:
        if isinstance(draft, Path):
            draft.mkdir(
                parents=True, exist_ok=True
            )  # the name is fresh, so the first rank makes it
        part = _write_part(draft, state, world.rank)
    except OSError as error:
        problem = f"rank {world.rank}: {error}"
    gathered = world.gather({"part": part, "problem": problem})
    problems = [g["problem"] for g in gathered if g["problem"]]
    if not problems and world.rank == 0:
        try:
            _publish(
                draft,
                final,
                Manifest(step, stage, facts, *_merge(state.shapes, [g["part"] for g in gathered])),
            )
        except OSError as error:
            problems = [f"rank 0: {error}"]
    problems = world.from_first(problems)
    if problems:
        if world.rank == 0:
            with suppress(OSError):
                _remove(draft)
        raise CheckpointError(
            f"saving {final}: {'; '.join(problems)}. Earlier checkpoints are untouched. Fix: make"
            " room or fix the folder"
        )
    return final


def _names(root: Place, step: int, world: World) -> tuple[Place, Place | None]:
    """Return the folder of a step and the one to write to, the same on all ranks; None if it
    exists."""
    known = (
        [folder for folder in committed(root) if step_of(folder) == step] if world.rank == 0 else []
    )
    token = secrets.token_hex(4)
    fresh = f"step_{step:08d}" + (f"-{token}" if isinstance(root, Remote) else "")
    name, token = world.from_first((known[0].name, None) if known else (fresh, token))
    final = root / name
    return final, (
        None
        if token is None
        else final
        if isinstance(root, Remote)
        else root / f"{name}.tmp-{token}"
    )


def _remove(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.remove()


def _write_part(draft: Place, state: HostCopy, rank: int) -> dict[str, Any]:
    """Write this rank's file; return its entry for the manifest."""
    name = f"rank_{rank:05d}.safetensors"
    digest = write_tensors(draft / name, state.mine)
    boxes = {
        key: {"offset": list(box.offset), "shape": list(box.shape)}
        for key, box in state.boxes.items()
    }
    return {"file": name, "size": digest.size, "sha256": digest.sha256, "boxes": boxes}


def _merge(
    shapes: dict[str, tuple[torch.dtype, list[int]]], parts: list[dict]
) -> tuple[dict[str, TensorEntry], dict[str, dict]]:
    """Return the manifest's two tables: every logical tensor with its parts, every file with its
    hash."""
    entries = {}
    for name, (dtype, shape) in shapes.items():
        entries[name] = TensorEntry(
            DTYPES[dtype],
            shape,
            [Part(p["file"], **p["boxes"][name]) for p in parts if name in p["boxes"]],
        )
        _check_cover(name, entries[name])
    return entries, {p["file"]: {"size": p["size"], "sha256": p["sha256"]} for p in parts}


def _check_cover(name: str, entry: TensorEntry) -> None:
    held = sum(torch.Size(part.shape).numel() for part in entry.parts)
    assert held == torch.Size(entry.shape).numel(), (
        f"{name}: parts hold {held} elements of shape {entry.shape}"
    )


def _publish(draft: Place, final: Place, manifest: Manifest) -> None:
    """Write manifest, folder name and pointer in this order, each flushed before the next."""
    write_text(draft / NAME, to_text(manifest))
    if not isinstance(draft, Path) or not isinstance(final, Path):
        write_text(final.parent / "latest", final.name + "\n")
        return
    sync_folder(draft)
    draft.rename(final)
    sync_folder(final.parent)
    pointer = final.parent / f"latest.tmp-{secrets.token_hex(4)}"
    write_text(pointer, final.name + "\n")
    pointer.rename(final.parent / "latest")
    sync_folder(final.parent)


def prune(root: Place, keep_last: int, keep_every: int, world: World, keep_best: int = 0) -> None:
    """Delete drafts, and all checkpoints but the newest `keep_last`, those of every `keep_every`-th
    step (0: none) and the `keep_best` with the lowest held-out loss.

    Errors: CheckpointError on all ranks when something could not be deleted.
    """
    problems = []
    if world.rank == 0:
        kept, unfinished = best(root, keep_best), drafts(root)
        for folder in [*committed(root)[:-keep_last], *unfinished]:
            step = STEP_FOLDER.fullmatch(folder.name)
            if folder not in kept and not (
                step and keep_every and int(step[1]) % keep_every == 0 and folder not in unfinished
            ):
                try:
                    _remove(folder)
                except OSError as error:
                    problems.append(str(error))
    problems = world.from_first(problems)
    if problems:
        raise CheckpointError(
            f"deleting old checkpoints in {root}: {'; '.join(problems)}. Fix: delete them by hand"
        )


def best(root: Place, count: int) -> list[Place]:
    """Return the `count` checkpoints with the lowest held-out loss, best first; of equals the
    newer. Those without a loss do not count."""
    losses: list[tuple[float, Place]] = []
    for folder in reversed(committed(root) if count else []):
        with suppress(CheckpointError):  # damaged: the next start quarantines it
            loss = read_manifest(folder).facts.get("validation_loss")
            losses += [(loss, folder)] if isinstance(loss, float) else []
    return [folder for _, folder in sorted(losses, key=lambda pair: pair[0])[:count]]


def drafts(root: Place) -> list[Place]:
    """Return the folders of saves that did not finish."""
    if isinstance(root, Path):
        return (
            [*sorted(p for p in root.iterdir() if p.is_dir() and ".tmp-" in p.name)]
            if root.is_dir()
            else []
        )
    folders = [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name)]
    return [p for p in folders if not (p / NAME).is_file() and not (p / BAD).is_file()]
