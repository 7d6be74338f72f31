"""The manifest of a checkpoint: what is in it, which mesh wrote it, and the hash of every file, itself included.

A manifest is one line of canonical JSON, `{"body": ..., "sha256": ...}`; reading it re-makes that line and compares, so that any changed
byte is found. It is written last: a folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that must not be used, and why."""


@dataclass(frozen=True)
class Part:
    """A box of one tensor in one file. `key` is its name in the file."""

    file: str
    offset: list[int]
    shape: list[int]


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor: its global shape and the parts that make it up."""

    dtype: str
    shape: list[int]
    parts: list[Part]


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint. `step` counts finished steps; `facts` holds what resuming compares (config, data, model, mesh)."""

    step: int
    stage: str
    facts: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, dict[str, Any]]
    format: int = FORMAT


def to_text(manifest: Manifest) -> str:
    """The one line that stands for this manifest."""
    body = _canonical(asdict(manifest))
    return f'{{"body":{body},"sha256":"{_digest(body)}"}}\n'


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Errors: CheckpointError when it is absent, damaged, or of another format.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder}: got no {NAME}, expected one (it was not finished). Fix: use another checkpoint")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        outer = json.loads(text)
        body = outer["body"]
        whole = f'{{"body":{_canonical(body)},"sha256":"{_digest(_canonical(body))}"}}\n'
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {NAME} is damaged ({error}). Fix: use another checkpoint") from error
    if whole != text:
        raise CheckpointError(f"checkpoint {folder}: {NAME} does not match its own sha256. Fix: use another checkpoint")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder}: got format {body.get('format')}, expected {FORMAT}. Fix: read it with the version that wrote it"
        )
    tensors = {
        name: TensorEntry(entry["dtype"], entry["shape"], [Part(**part) for part in entry["parts"]])
        for name, entry in body["tensors"].items()
    }
    return Manifest(body["step"], body["stage"], body["facts"], tensors, body["files"], body["format"])


def check_names(folder: Path, manifest: Manifest) -> None:
    """Refuse names that lead out of the folder, and files that the manifest does not know.

    Errors: CheckpointError.
    """
    for name in manifest.files:
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"checkpoint {folder}: got file name {name!r}, expected a plain name inside the folder")
    present = {p.name for p in folder.iterdir()} - {NAME}
    if present != set(manifest.files):
        missing, foreign = sorted(set(manifest.files) - present), sorted(present - set(manifest.files))
        raise CheckpointError(f"checkpoint {folder}: missing files {missing}, foreign files {foreign}. Fix: use another checkpoint")
    used = {part.file for entry in manifest.tensors.values() for part in entry.parts}
    if not used <= set(manifest.files):
        raise CheckpointError(f"checkpoint {folder}: tensors name files that it does not list: {sorted(used - set(manifest.files))}")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
