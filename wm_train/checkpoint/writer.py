"""Write checkpoints and delete old ones: `copy` and `commit` of the protocol in `store.py`."""

from __future__ import annotations

import errno
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
    DRAFT,
    NAME,
    STEP_FOLDER,
    CheckpointError,
    Manifest,
    Part,
    TakenError,
    TensorEntry,
    committed,
    read_manifest,
    same_facts,
    step_of,
    to_text,
)
from wm_train.checkpoint.tensor_file import DTYPES, sync_folder, write_tensors, write_text
from wm_train.storage import Place, Remote
from wm_train.world import World

# a full disk, a quota, a folder that may not be written: somebody must act
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


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
    """Write and publish a state; return its folder on every rank. A step that was committed with
    the same facts already is left as it is.

    Errors: CheckpointError on all ranks when any rank could not write, TakenError when the step is
    there and another's; committed checkpoints are untouched.
    """
    final, draft = _names(root, step, facts, world)
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
        problem = _described(error, world.rank)
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
            problems = [_described(error, 0)]
    problems = world.from_first(problems)
    if problems:
        if world.rank == 0:
            with suppress(OSError):
                _remove(draft)
        texts = "; ".join(text for text, _ in problems)
        failure = CheckpointError(
            f"saving {final}: {texts}. Earlier checkpoints are untouched. Fix: make room or fix the"
            " folder"
        )
        failure.passing = all(passing for _, passing in problems)
        raise failure
    return final


def _described(error: OSError, rank: int) -> tuple[str, bool]:
    """Return an error's text, and if it may pass by itself."""
    return f"rank {rank}: {error}", error.errno not in LASTING


def _names(
    root: Place, step: int, facts: dict[str, Any], world: World
) -> tuple[Place, Place | None]:
    """Return the folder of a step and the one to write to, the same on all ranks; None if it
    exists."""
    token, found = secrets.token_hex(4), _Found(None, False, "")
    if world.rank == 0:
        found = _find_step(root, step, facts)
    token, (known, occupied, problem) = world.from_first((token, found))
    if problem:
        raise TakenError(problem)
    if known:
        return root / known, None
    plain = f"step_{step:08d}"
    if isinstance(root, Remote):
        return root / f"{plain}-{token}", root / f"{plain}-{token}"
    name = f"{plain}-{token}" if occupied else plain
    return root / name, root / f"{name}.tmp-{token}"


class _Found(NamedTuple):
    """Hold the folder of a step that was saved before, if the plain name is taken by something
    else, and whose the step is if it is another's."""

    known: str | None
    occupied: bool
    problem: str


def _find_step(root: Place, step: int, facts: dict[str, Any]) -> _Found:
    try:
        folders = [folder for folder in committed(root) if step_of(folder) == step]
    except OSError:  # a store that does not answer: writing will say so
        folders = []
    for folder in folders:
        try:
            if same_facts(read_manifest(folder), facts):
                return _Found(folder.name, False, "")
        except (CheckpointError, OSError):
            continue  # damaged, or a copy under a wrong name: it stays beside ours
        return _Found(
            None,
            True,
            f"saving {folder}: step {step} is there already, and was written by another run or"
            " command. It is untouched. Fix: one run per place: another name=..., out=... or"
            " trainer.checkpoint_to=...",
        )
    return _Found(None, bool(folders), "")


def _remove(folder: Place) -> None:
    """Delete a checkpoint or a draft. It ceases to be a checkpoint first: a reader, and whoever
    comes after a kill in the middle, never takes a half for a damaged one."""
    if isinstance(folder, Path):
        draft = folder
        if ".tmp-" not in folder.name:
            draft = folder.rename(f"{folder}.tmp-{secrets.token_hex(4)}")
        shutil.rmtree(draft)
    else:
        if (folder / NAME).is_file():
            (folder / NAME).unlink()
        if folder.exists():
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
        problems = delete([*_old(root, keep_last, keep_every, keep_best), *drafts(root)])
    problems = world.from_first(problems)
    if problems:
        raise CheckpointError(
            f"deleting old checkpoints in {root}: {'; '.join(problems)}. Fix: delete them by hand"
        )


def _old(root: Place, keep_last: int, keep_every: int, keep_best: int) -> list[Place]:
    """Return the checkpoints to delete, of those whose manifest says that they are ours and of that
    step."""
    kept, newest, old = best(root, keep_best), 0, list[Place]()
    for folder in reversed(committed(root)):
        step = step_of(folder)
        spared = folder in kept or (keep_every and step % keep_every == 0)
        if newest == keep_last and spared:
            continue
        with suppress(CheckpointError):  # not ours, or damaged: left alone
            read_manifest(folder)
            if newest < keep_last:
                newest += 1
            else:
                old.append(folder)
    return old


def delete(folders: Iterable[Place]) -> list[str]:
    """Delete checkpoints and drafts; return what could not be deleted."""
    problems = []
    for folder in folders:
        try:
            _remove(folder)
        except OSError as error:
            problems.append(str(error))
    return problems


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
    """Return the folders of saves that did not finish, by the names that only we give."""
    if isinstance(root, Path):
        there = root.iterdir() if root.is_dir() else []
        return sorted(p for p in there if DRAFT.fullmatch(p.name) and p.is_dir())
    named = [p for p in root.iterdir() if (m := STEP_FOLDER.fullmatch(p.name)) and m[2]]
    return [p for p in named if not (p / NAME).is_file() and not (p / BAD).is_file()]
