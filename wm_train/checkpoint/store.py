"""Checkpoints that are either whole or absent (design §9).

    copy   each rank's boxes go to the host, into buffers that are kept from save to save
    commit every rank writes them into step_N.tmp-<id>/rank_R.safetensors, hashing as it writes; rank 0 writes the manifest last,
           renames the folder to step_N, and points `latest` at it
    find   rank 0 goes from the newest folder down; all ranks hash its files, each a share; a bad one is renamed to step_N.bad-<id>, the
           reason is reported, and the next older one is tried; rank 0's choice holds for everybody
    load   each rank reads just the boxes it needs, so any mesh can read what any other wrote

A store without rename (s3://, see storage.py) gets step_N-<id>/ at once; it counts when the manifest
is there, and a bad one loses its.

Plain torch.distributed.checkpoint finds none of 200 flipped bits, mixes two saves in one folder,
and its metadata is a pickle; hence ours.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from wm_train.boxes import Box, is_first_copy, local_box, local_tensor, overlap, within
from wm_train.checkpoint.manifest import (
    NAME,
    STEP_FOLDER,
    CheckpointError,
    Manifest,
    Part,
    TensorEntry,
    check_names,
    committed,
    read_manifest,
    to_text,
)
from wm_train.checkpoint.tensor_file import (
    DTYPES,
    RemoteTensors,
    read_digest,
    sync_folder,
    write_tensors,
    write_text,
)
from wm_train.storage import Place, Remote
from wm_train.world import World

BAD = "manifest.bad"


class HostCopy(NamedTuple):
    """What one rank writes of a state, on the host, and what the whole state looks like."""

    mine: dict[str, torch.Tensor]
    boxes: dict[str, Box]
    shapes: dict[str, tuple[torch.dtype, list[int]]]


def copy_to_host(
    tensors: Iterable[tuple[str, torch.Tensor]],
    rank: int,
    kept: dict[str, torch.Tensor] | None = None,
) -> HostCopy:
    """This rank's boxes of plain tensors and DTensors, which are let go one by one. With `kept`,
    copies into its buffers, made at the first call, so that training may go on while they are
    written; without, host tensors are taken as they are."""
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
    """Write and publish a state; returns its folder on every rank. A step that is committed already
    is left as it is.

    Errors: CheckpointError on all ranks when any rank could not write; what was committed before is
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
            )  # the name is fresh, so whoever comes first makes it
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
    """The folder of a step and the one to write to, the same on all ranks; None: it is there
    already."""
    known = (
        [folder for folder in committed(root) if _step(folder) == step] if world.rank == 0 else []
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


def _step(folder: Place) -> int:
    found = STEP_FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _remove(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.remove()


def _write_part(draft: Place, state: HostCopy, rank: int) -> dict[str, Any]:
    """Write this rank's file; returns what the manifest needs to know of it."""
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
    """The manifest's two tables: every logical tensor with its parts, and every file with its
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
    """Manifest, folder name, pointer: in this order, each flushed before the next."""
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


def verify(folder: Place, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Hash the files `share[0]::share[1]` of a checkpoint; returns what is wrong with them."""
    problems = []
    for name in sorted(manifest.files)[share[0] :: share[1]]:
        expected = manifest.files[name]
        found = read_digest(folder / name)
        if found.size != expected["size"]:
            problems.append(f"{name}: got {found.size} bytes, expected {expected['size']}")
        elif found.sha256 != expected["sha256"]:
            problems.append(f"{name}: its sha256 is not the manifest's")
    return problems


def find_newest(
    root: Place, world: World, report: Callable[[str], None], before: int | None = None
) -> tuple[Place, Manifest] | None:
    """The newest valid checkpoint under `root` (of a step less than `before`), the same on all
    ranks, or None. Bad ones are quarantined and reported."""
    while True:
        found = committed(root) if world.rank == 0 else []
        found = [folder for folder in found if before is None or _step(folder) < before]
        name = world.from_first(found[-1].name if found else None)
        if name is None:
            return None
        folder = root / name
        try:
            return folder, check(folder, world)
        except CheckpointError as error:
            if world.rank == 0:
                aside = _set_aside(folder)
                report(f"quarantined a bad checkpoint as {aside}: {error}")
            world.barrier()


def _set_aside(folder: Place) -> Place:
    """Take a bad checkpoint out of the way but leave it to be looked at."""
    if isinstance(folder, Path):
        return folder.rename(folder.with_name(f"{folder.name}.bad-{secrets.token_hex(4)}"))
    manifest = folder / NAME
    write_text(folder / BAD, manifest.read_text(errors="replace"))
    manifest.unlink()
    return folder / BAD


def withdraw(folder: Place) -> None:
    """Make a checkpoint a draft: it is never taken for a checkpoint, and is cleaned with the next
    save."""
    if isinstance(folder, Path):
        folder.rename(folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}"))
    else:
        (folder / NAME).unlink()


def check(folder: Place, world: World) -> Manifest:
    """The manifest of `folder` after every file was hashed, each rank a share.

    Errors: CheckpointError, the same on all ranks.
    """
    manifest, problems = None, []
    try:
        manifest = read_manifest(folder)
        check_names(folder, manifest)
        problems = verify(folder, manifest, (world.rank, world.size))
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    found = [problem for share in world.gather(problems) for problem in share]
    if found:
        raise CheckpointError(
            f"checkpoint {folder} is not usable: {'; '.join(dict.fromkeys(found))}. Fix: use"
            " another checkpoint"
        )
    assert manifest is not None
    return manifest


def load(
    folder: Place,
    manifest: Manifest,
    targets: Mapping[str, torch.Tensor],
    may_ignore: Collection[str] = (),
) -> None:
    """Copy the checkpoint's tensors into `targets` of the same names, in place, each rank its own
    box.

    Every stored tensor must have a target, but for the names in `may_ignore`. Errors:
    CheckpointError that lists every missing, extra or mis-shaped name; nothing is copied then.
    """
    stored = manifest.tensors
    problems = [f"missing {n}" for n in targets if n not in stored]
    problems += [f"extra {n}" for n in stored if n not in targets and n not in may_ignore]
    for name, target in targets.items():
        if name in stored and list(target.shape) != stored[name].shape:
            problems.append(
                f"{name} has shape {stored[name].shape}, the model's is {list(target.shape)}"
            )
    if problems:
        shown = "; ".join(problems[:20]) + (
            f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise CheckpointError(
            f"loading {folder}: {shown}. Fix: use the model that wrote this checkpoint"
        )
    try:
        _read(folder, manifest, targets)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"loading {folder}: {error}. Fix: use another checkpoint") from error


def _read(folder: Place, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> None:
    stored = manifest.tensors
    with ExitStack() as files, torch.no_grad():
        names, opened = (
            {part.file for key in targets for part in stored[key].parts},
            dict[str, Any](),
        )
        for name in names:
            file = folder / name
            opened[name] = (
                files.enter_context(safe_open(file, framework="pt"))
                if isinstance(file, Path)
                else RemoteTensors(file)
            )
        for name, target in targets.items():
            _fill(opened, name, stored[name], target)


def _fill(files: dict[str, Any], key: str, entry: TensorEntry, target: torch.Tensor) -> None:
    """Copy what the parts hold of this process's box of `target`."""
    box, storage = local_box(target), local_tensor(target)
    for part in entry.parts:
        source = Box(tuple(part.offset), tuple(part.shape))
        common = overlap(box, source)
        if common.empty:
            continue
        file = files[part.file]
        piece = (
            file.get_slice(key)[within(common, source)] if common.shape else file.get_tensor(key)
        )
        storage[within(common, box)].copy_(piece)


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
    """The `count` checkpoints with the lowest held-out loss, best first; of equals the newer. Those
    without a loss do not count."""
    losses: list[tuple[float, Place]] = []
    for folder in reversed(committed(root) if count else []):
        with suppress(
            CheckpointError
        ):  # a damaged one is no best; the next start will set it aside
            loss = read_manifest(folder).facts.get("validation_loss")
            losses += [(loss, folder)] if isinstance(loss, float) else []
    return [folder for _, folder in sorted(losses, key=lambda pair: pair[0])[:count]]


def drafts(root: Place) -> list[Place]:
    """Folders of saves that did not end."""
    if isinstance(root, Path):
        return (
            [*sorted(p for p in root.iterdir() if p.is_dir() and ".tmp-" in p.name)]
            if root.is_dir()
            else []
        )
    found = [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name)]
    return [p for p in found if not (p / NAME).is_file() and not (p / BAD).is_file()]
