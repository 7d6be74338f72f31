"""Find, verify and load checkpoints, each of which is either complete or absent.

    copy   each rank's boxes go to the host, into buffers that are reused by every save
    commit every rank writes them into step_N.tmp-<id>/rank_R.safetensors, hashing as it writes;
           rank 0 writes the manifest last, renames the folder to step_N, points `latest` at it
    find   rank 0 goes from the newest folder down; the ranks divide its files and hash them; the
           reason against a bad folder is reported, and the next older one is tried; rank 0's
           choice holds for all ranks. The run that the folder belongs to renames a bad one to
           step_N.bad-<id>; readers of other runs' checkpoints change nothing
    load   each rank reads just the boxes it needs, so any mesh can read what another wrote

A store without rename (s3://, see storage.py) gets step_N-<id>/ at once; it counts when the
manifest is there, and the manifest of a bad one is removed.

Plain torch.distributed.checkpoint detects none of 200 flipped bits, mixes two saves in one folder,
and its metadata is a pickle; hence ours. `copy` and `commit` are in `writer.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from wm_train.boxes import Box, local_box, local_tensor, overlap, within
from wm_train.checkpoint.manifest import (
    BAD,
    NAME,
    CheckpointError,
    Manifest,
    MisnamedError,
    TensorEntry,
    check_names,
    committed,
    read_manifest,
    step_of,
)
from wm_train.checkpoint.tensor_file import RemoteTensors, read_digest, write_text
from wm_train.storage import Place
from wm_train.world import World


def verify(folder: Place, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Hash the files `share[0]::share[1]` of a checkpoint; return what is wrong with them."""
    problems = []
    for name in sorted(manifest.files)[share[0] :: share[1]]:
        expected = manifest.files[name]
        actual = read_digest(folder / name, expected["size"])
        if actual.size != expected["size"]:
            problems.append(f"{name}: got {actual.size} bytes, expected {expected['size']}")
        elif actual.sha256 != expected["sha256"]:
            problems.append(f"{name}: its sha256 is not the manifest's")
    return problems


def find_newest(
    root: Place,
    world: World,
    report: Callable[[str], None],
    before: int | None = None,
    mine: bool = False,
) -> tuple[Place, Manifest] | None:
    """Return the newest valid checkpoint under `root` (of a step less than `before`), the same on
    all ranks, or None. Bad ones are reported, and set aside if the folder is `mine`: others may be
    reading it, or be its owner.

    Errors: CheckpointError on all ranks when a bad one could not be set aside.
    """
    passed: set[str] = set()
    while True:
        folders = committed(root) if world.rank == 0 else []
        names = [f.name for f in folders if before is None or step_of(f) < before]
        name = world.from_first(next((n for n in reversed(names) if n not in passed), None))
        if name is None:
            return None
        folder = root / name
        try:
            return folder, check(folder, world)
        except CheckpointError as error:
            passed.add(name)
            problem = None
            if world.rank == 0:
                try:
                    line = _pass_over(folder, str(error), mine)
                    if line:
                        report(line)
                except OSError as failure:
                    problem = (
                        f"setting aside {folder}: {failure}. It is bad: {error}. Fix: move it away"
                    )
            problem = world.from_first(problem)
            if problem:
                raise CheckpointError(problem) from error


def _pass_over(folder: Place, reason: str, mine: bool) -> str:
    """Deal with a folder that is not usable; return what to say, "" for one that its run has
    deleted meanwhile."""
    if folder not in committed(folder.parent):
        return ""
    try:
        read_manifest(folder)
    except MisnamedError as error:
        return f"passed over, and left alone: {error}"
    except (CheckpointError, OSError):
        pass  # that is the reason
    if not mine:
        return f"passed over a bad checkpoint: {reason}"
    return f"quarantined a bad checkpoint as {_set_aside(folder)}: {reason}"


def _set_aside(folder: Place) -> Place:
    """Rename a bad checkpoint, so that it is no longer found but can be examined."""
    if isinstance(folder, Path):
        return folder.rename(folder.with_name(f"{folder.name}.bad-{secrets.token_hex(4)}"))
    manifest = folder / NAME
    write_text(folder / BAD, manifest.read_text(errors="replace"))
    manifest.unlink()
    return folder / BAD


def withdraw(folder: Place) -> None:
    """Turn a checkpoint into a draft, which is never loaded and is deleted by the next save."""
    if isinstance(folder, Path):
        folder.rename(folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}"))
    else:
        (folder / NAME).unlink()


def check(folder: Place, world: World) -> Manifest:
    """Return the manifest of `folder` after hashing every file, divided over the ranks.

    Errors: CheckpointError, the same on all ranks.
    """
    manifest, problems = None, []
    try:
        manifest = read_manifest(folder)
        check_names(folder, manifest)
        problems = verify(folder, manifest, (world.rank, world.size))
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    reports = [problem for share in world.gather(problems) for problem in share]
    if reports:
        raise CheckpointError(
            f"checkpoint {folder} is not usable: {'; '.join(dict.fromkeys(reports))}. Fix: use"
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
    """Copy this rank's box of `target` from the parts."""
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
