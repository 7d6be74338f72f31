"""Run `python -m wm_train.checkpoint verify|inspect|export|prune <folder>`. Exit code 2 when a
checkpoint is not usable."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

from launch.screen import print_result
from wm_train.checkpoint import store, writer
from wm_train.checkpoint.manifest import STEP_FOLDER, CheckpointError, Manifest, read_manifest
from wm_train.config.kinds import ModelConfig
from wm_train.config.problems import ConfigError
from wm_train.config.registry import config_class
from wm_train.config.typed import build_section
from wm_train.redact import clean_output
from wm_train.resilience.one_run import owned_place
from wm_train.resilience.run_lock import COMMAND, check_free
from wm_train.storage import Place, place
from wm_train.world import World

ALONE = World(0, 1)
FOLDERS = ("diffusers", "native")  # layouts of a public checkpoint, which is a directory


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """Run one of the four commands."""
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.checkpoint",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, words in {
        "verify": "hash every file of a checkpoint, or of all checkpoints of a stage",
        "inspect": "print what a checkpoint holds: step, stage, mesh, tensors, bytes",
        "export": (
            "write the weights as one safetensors file, or as a directory that diffusers'"
            " from_pretrained reads"
        ),
        "prune": "delete all but the newest checkpoints of a stage",
    }.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument(
            "folder", type=place, help="step_N, or the checkpoints folder of a stage; also s3://..."
        )
        if name == "export":
            command.add_argument(
                "out",
                type=Path,
                help="file to write, ending in .safetensors; with another layout a directory",
            )
            command.add_argument(
                "--layout",
                choices=("file", *FOLDERS),
                default="file",
                help="one file, the model's class in diffusers, or the names of its authors' code",
            )
            command.add_argument(
                "--weights",
                choices=("ema", "raw"),
                default="ema",
                help="averaged weights or as trained (default: ema)",
            )
        if name == "prune":
            command.add_argument(
                "--keep-last", type=int, required=True, help="how many to keep, at least 1"
            )
    arguments = parser.parse_args(argv)
    try:
        return {"verify": verify, "inspect": inspect, "export": export, "prune": prune}[
            arguments.command
        ](arguments)
    except (CheckpointError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def select_checkpoints(folder: Place) -> list[Place]:
    """Return the checkpoint itself, or all of a stage, oldest first."""
    folders = [folder] if STEP_FOLDER.fullmatch(folder.name) else store.committed(folder)
    if not folders or not all(path.is_dir() for path in folders):
        raise CheckpointError(
            f"checkpoint: got {folder}, expected a step_N folder or a stage's checkpoints folder."
            " Fix: name one"
        )
    return folders


def verify(arguments: argparse.Namespace) -> int:
    code = 0
    for folder in select_checkpoints(arguments.folder):
        try:
            manifest = store.check(folder, ALONE)
            print(
                f"good  {folder}: step {manifest.step}, {len(manifest.files)} files,"
                f" {_bytes(manifest):,} bytes"
            )
        except CheckpointError as error:
            print(f"bad   {error}")
            code = 2
    return code


def inspect(arguments: argparse.Namespace) -> int:
    folder = select_checkpoints(arguments.folder)[-1]
    manifest = read_manifest(folder)
    print(
        f"{folder}: stage {manifest.stage}, step {manifest.step}, written by"
        f" {manifest.facts.get('world')} processes"
    )
    own = ("model/", "ema/", "optimizer/")
    roles = sorted(
        {name.partition("/")[0] for name in manifest.tensors if not name.startswith(own)}
    )
    for section in (*own, *(f"{role}/{section}" for role in roles for section in own)):
        names = [name for name in manifest.tensors if name.startswith(section)]
        elements = sum(_elements(manifest.tensors[name].shape) for name in names)
        print(f"  {section.rstrip('/'):10} {len(names):6} tensors  {elements:15,} elements")
    print(f"  {len(manifest.files)} files, {_bytes(manifest):,} bytes")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write weights under their names in the model, each whole, to one file or to the directory of
    a public checkpoint."""
    import torch

    from wm_train.checkpoint.tensor_file import DTYPES
    from wm_train.models.public import export_pretrained
    from wm_train.models.public_files import save_weights

    folder = select_checkpoints(arguments.folder)[-1]
    check_out(arguments.out, arguments.layout)
    manifest = store.check(folder, ALONE)
    model = model_config(folder, manifest) if arguments.layout in FOLDERS else None
    torch_types = {word: dtype for dtype, word in DTYPES.items()}
    averaged = (
        {n.removeprefix("ema/") for n in manifest.tensors if n.startswith("ema/")}
        if arguments.weights == "ema"
        else set()
    )
    names = [n.removeprefix("model/") for n in manifest.tensors if n.startswith("model/")]
    targets = {}
    for name in names:
        key = ("ema/" if name in averaged else "model/") + name
        entry = manifest.tensors[key]
        try:
            targets[key] = torch.empty(entry.shape, dtype=torch_types[entry.dtype])
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"export: got {key} of shape {entry.shape}, expected what fits in memory"
                f" ({_bytes(manifest):,} bytes in all). Fix: a machine with more"
            ) from error
    store.load(folder, manifest, targets, may_ignore=manifest.tensors)
    weights = {key.split("/", 1)[1]: tensor for key, tensor in targets.items()}
    if model is not None:
        native = arguments.layout == "native"
        export_pretrained(weights, model, arguments.out, native=native)
        write_sampling(manifest, arguments.out)
    else:
        save_weights(weights, arguments.out, {"step": str(manifest.step)})
    print(
        f"{len(targets)} tensors of {folder} ({'averaged' if averaged else 'as trained'}) in"
        f" {arguments.out}"
    )
    return 0


def write_sampling(manifest: Manifest, out: Path) -> None:
    """Write `sampling.json` beside the weights of a stage that samples chunk by chunk: its chunks,
    sampler and whole model, of which the public config.json has no word."""
    facts, stage = manifest.facts, manifest.stage
    try:
        known = facts["config"]["recipe"]["stages"][stage]
        found = {"chunk_frames": known["chunk_frames"], "sampler": known["sampler"]}
    except (LookupError, TypeError):
        return  # a checkpoint that was not written by a run
    if found["chunk_frames"]:
        text = json.dumps({"stage": stage, **found, "model": facts["identity"]["model"]}, indent=1)
        (out / "sampling.json").write_text(text + "\n", encoding="utf-8")


def check_out(out: Path, layout: str) -> None:
    """Raise CheckpointError for a place that an export cannot be written to, before the checkpoint
    is read."""
    new = "a new or empty directory" if layout in FOLDERS else "a new file"
    taken = out.exists() and not (layout in FOLDERS and out.is_dir())
    if taken or out.is_symlink():
        raise CheckpointError(f"export: got {out}, which exists, expected {new}. Fix: name another")
    if layout == "file" and not out.parent.is_dir():
        raise CheckpointError(
            f"export: got {out}, expected a file in an existing folder. Fix: mkdir -p"
            f" {shlex.quote(str(out.parent))}"
        )


def model_config(folder: Place, manifest: Manifest) -> ModelConfig:
    """Return the model that a checkpoint holds, as its stage trained it.

    Errors: CheckpointError when its facts do not say it.
    """
    where = "identity.model"
    held = manifest.facts.get("identity", {}).get("model")
    try:
        kind = config_class("models", held["name"])
        known = {field.name for field in dataclasses.fields(kind)}
        plain = {key: value for key, value in held.items() if key in known}
        model: ModelConfig = build_section(ModelConfig, plain, where)
        return model
    except ConfigError as error:
        wrong = "; ".join(str(problem) for problem in error.problems)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        wrong = f"{type(error).__name__} {error}"
    raise CheckpointError(
        f"checkpoint {folder}: got {where} {str(held)[:200]}, expected a model's configuration"
        f" ({wrong[:300]}). Fix: --layout file"
    )


def prune(arguments: argparse.Namespace) -> int:
    """Delete drafts and all checkpoints but the newest that are whole. What is no checkpoint of
    ours, is damaged, or lies under a wrong name, is left alone. Refused while a run owns the
    folder."""
    root, keep = arguments.folder, arguments.keep_last
    if keep < 1:
        raise CheckpointError(f"prune: got --keep-last {keep}, expected at least 1")
    if not root.is_dir():
        raise CheckpointError(f"prune: got {root}, expected a stage's checkpoints folder")
    for stage in root.resolve().parents[:1] if isinstance(root, Path) else ():
        check_free(stage, COMMAND)  # between two attempts nobody else is there
    with owned_place(root):
        good, old = 0, list[Place]()
        folders = store.committed(root)
        for folder in reversed(folders):
            try:
                # what is kept must be usable, of the rest it is enough that it is ours
                read_manifest(folder) if good == keep else store.check(folder, ALONE)
            except CheckpointError as error:
                print(f"left alone: {error}")
                continue
            if good < keep:
                good += 1
            else:
                old.append(folder)
        problems = writer.delete([*old, *writer.drafts(root)])
    if problems:
        raise CheckpointError(f"prune {root}: {'; '.join(problems)}. Fix: delete them by hand")
    print(f"deleted {len(old)} of {len(folders)} checkpoints in {root}")
    return 0


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes(manifest: Manifest) -> int:
    return sum(entry["size"] for entry in manifest.files.values())


if __name__ == "__main__":
    sys.exit(print_result(main))
