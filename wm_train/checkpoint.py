"""Checkpoints that are either whole or absent (design §9).

    copy   each rank's boxes go to the host, into buffers that are kept from save to save
    commit every rank writes them into step_N.tmp-<id>/rank_R.safetensors, hashing as it writes; rank 0 writes the manifest last,
           renames the folder to step_N, and points `latest` at it
    find   rank 0 goes from the newest folder down; all ranks hash its files, each a share; a bad one is renamed to step_N.bad-<id>, the
           reason is reported, and the next older one is tried; rank 0's choice holds for everybody
    load   each rank reads just the boxes it needs, so any mesh can read what any other wrote

Plain torch.distributed.checkpoint finds none of 200 flipped bits, mixes two saves in one folder, and its metadata is a pickle; hence ours.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from wm_train.manifest import NAME, CheckpointError, Manifest, Part, TensorEntry, check_names, read_manifest, to_text
from wm_train.shard_file import DTYPES, read_digest, sync_folder, write_tensors, write_text
from wm_train.tensor_parts import Box, is_first_copy, local_box, local_tensor, overlap, within
from wm_train.world import World

STEP_FOLDER = re.compile(r"step_(\d{8})")


class HostCopy(NamedTuple):
    """What one rank writes of a state, on the host, and what the whole state looks like."""

    mine: dict[str, torch.Tensor]
    boxes: dict[str, Box]
    shapes: dict[str, tuple[torch.dtype, list[int]]]


def copy_to_host(tensors: Mapping[str, torch.Tensor], rank: int, kept: dict[str, torch.Tensor] | None = None) -> HostCopy:
    """This rank's boxes of plain tensors and DTensors. With `kept`, copies into its buffers, made at the first call, so that training may
    go on while they are written; without, host tensors are taken as they are."""
    mine, boxes = {}, {}
    for name, tensor in tensors.items():
        box = local_box(tensor)
        if is_first_copy(tensor, rank) and not box.empty:
            boxes[name], local = box, local_tensor(tensor).detach()
            if kept is None:
                mine[name] = local.cpu()
            else:
                mine[name] = kept.setdefault(name, torch.empty(local.shape, dtype=local.dtype)).copy_(local)
    return HostCopy(mine, boxes, {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()})


def save(root: Path, step: int, stage: str, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any], world: World) -> Path:
    """Write the state after `step` finished steps and publish it, now; see `commit`."""
    return commit(root, step, stage, copy_to_host(tensors, world.rank), facts, world)


def commit(root: Path, step: int, stage: str, state: HostCopy, facts: dict[str, Any], world: World) -> Path:
    """Write and publish a state; returns its folder on every rank. A step that is committed already is left as it is.

    Errors: CheckpointError on all ranks when any rank could not write; what was committed before is untouched.
    """
    final = root / f"step_{step:08d}"
    token = world.from_first(None if final.exists() else secrets.token_hex(4))
    if token is None:
        return final
    draft = root / f"{final.name}.tmp-{token}"
    part, problem = None, None
    try:
        draft.mkdir(parents=True, exist_ok=True)  # the name is fresh, so whoever comes first makes it
        part = _write_part(draft, state, world.rank)
    except OSError as error:
        problem = f"rank {world.rank}: {error}"
    gathered = world.gather({"part": part, "problem": problem})
    problems = [g["problem"] for g in gathered if g["problem"]]
    if not problems and world.rank == 0:
        try:
            _publish(draft, final, Manifest(step, stage, facts, *_merge(state.shapes, [g["part"] for g in gathered])))
        except OSError as error:
            problems = [f"rank 0: {error}"]
    problems = world.from_first(problems)
    if problems:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"saving {final}: {'; '.join(problems)}. Earlier checkpoints are untouched. Fix: make room or fix the folder")
    return final


def _write_part(draft: Path, state: HostCopy, rank: int) -> dict[str, Any]:
    """Write this rank's file; returns what the manifest needs to know of it."""
    name = f"rank_{rank:05d}.safetensors"
    digest = write_tensors(draft / name, state.mine)
    boxes = {key: {"offset": list(box.offset), "shape": list(box.shape)} for key, box in state.boxes.items()}
    return {"file": name, "size": digest.size, "sha256": digest.sha256, "boxes": boxes}


def _merge(shapes: dict[str, tuple[torch.dtype, list[int]]], parts: list[dict]) -> tuple[dict[str, TensorEntry], dict[str, dict]]:
    """The manifest's two tables: every logical tensor with its parts, and every file with its hash."""
    entries = {}
    for name, (dtype, shape) in shapes.items():
        entries[name] = TensorEntry(DTYPES[dtype], shape, [Part(p["file"], **p["boxes"][name]) for p in parts if name in p["boxes"]])
        _check_cover(name, entries[name])
    return entries, {p["file"]: {"size": p["size"], "sha256": p["sha256"]} for p in parts}


def _check_cover(name: str, entry: TensorEntry) -> None:
    held = sum(torch.Size(part.shape).numel() for part in entry.parts)
    assert held == torch.Size(entry.shape).numel(), f"{name}: parts hold {held} elements of shape {entry.shape}"


def _publish(draft: Path, final: Path, manifest: Manifest) -> None:
    """Manifest, folder name, pointer: in this order, each flushed before the next."""
    write_text(draft / NAME, to_text(manifest))
    sync_folder(draft)
    draft.rename(final)
    sync_folder(final.parent)
    pointer = final.parent / f"latest.tmp-{secrets.token_hex(4)}"
    write_text(pointer, final.name + "\n")
    pointer.rename(final.parent / "latest")
    sync_folder(final.parent)


def committed(root: Path) -> list[Path]:
    """Published checkpoint folders, oldest first. Unfinished and quarantined ones have other names."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and STEP_FOLDER.fullmatch(p.name))


def verify(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
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


def find_newest(root: Path, world: World, report: Callable[[str], None], before: int | None = None) -> tuple[Path, Manifest] | None:
    """The newest valid checkpoint under `root` (of a step less than `before`), the same on all ranks, or None. Bad ones are quarantined
    and reported."""
    while True:
        found = committed(root) if world.rank == 0 else []
        found = [folder for folder in found if before is None or int(folder.name.removeprefix("step_")) < before]
        name = world.from_first(found[-1].name if found else None)
        if name is None:
            return None
        folder = root / name
        try:
            return folder, check(folder, world)
        except CheckpointError as error:
            if world.rank == 0:
                aside = root / f"{name}.bad-{secrets.token_hex(4)}"
                folder.rename(aside)
                report(f"quarantined a bad checkpoint as {aside}: {error}")
            world.barrier()


def check(folder: Path, world: World) -> Manifest:
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
        raise CheckpointError(f"checkpoint {folder} is not usable: {'; '.join(dict.fromkeys(found))}. Fix: use another checkpoint")
    assert manifest is not None
    return manifest


def load(folder: Path, manifest: Manifest, targets: Mapping[str, torch.Tensor], may_ignore: Collection[str] = ()) -> None:
    """Copy the checkpoint's tensors into `targets` of the same names, in place, each rank its own box.

    Every stored tensor must have a target, but for the names in `may_ignore`.
    Errors: CheckpointError that lists every missing, extra or mis-shaped name; nothing is copied then.
    """
    stored = manifest.tensors
    problems = [f"missing {n}" for n in targets if n not in stored]
    problems += [f"extra {n}" for n in stored if n not in targets and n not in may_ignore]
    for name, target in targets.items():
        if name in stored and list(target.shape) != stored[name].shape:
            problems.append(f"{name} has shape {stored[name].shape}, the model's is {list(target.shape)}")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"loading {folder}: {shown}. Fix: use the model that wrote this checkpoint")
    try:
        _read(folder, manifest, targets)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"loading {folder}: {error}. Fix: use another checkpoint") from error


def _read(folder: Path, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> None:
    stored = manifest.tensors
    with ExitStack() as files, torch.no_grad():
        names = {part.file for key in targets for part in stored[key].parts}
        opened = {name: files.enter_context(safe_open(folder / name, framework="pt")) for name in names}
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
        piece = file.get_slice(key)[within(common, source)] if common.shape else file.get_tensor(key)
        storage[within(common, box)].copy_(piece)


def prune(root: Path, keep_last: int, keep_every: int, world: World) -> None:
    """Delete drafts, and all checkpoints but the newest `keep_last` and those of every `keep_every`-th step (0: none).

    Errors: CheckpointError on all ranks when something could not be deleted.
    """
    problems = []
    if world.rank == 0:
        for folder in [*committed(root)[:-keep_last], *drafts(root)]:
            step = STEP_FOLDER.fullmatch(folder.name)
            if not (step and keep_every and int(step[1]) % keep_every == 0):
                try:
                    shutil.rmtree(folder)
                except OSError as error:
                    problems.append(str(error))
    problems = world.from_first(problems)
    if problems:
        raise CheckpointError(f"deleting old checkpoints in {root}: {'; '.join(problems)}. Fix: delete them by hand")


def drafts(root: Path) -> list[Path]:
    """Folders of saves that did not end."""
    return sorted(p for p in root.iterdir() if p.is_dir() and ".tmp-" in p.name) if root.is_dir() else []


if __name__ == "__main__":
    import sys

    from wm_train.checkpoint_cli import main

    sys.exit(main())
