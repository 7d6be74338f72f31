"""Read, check and write the manifest of a checkpoint: its tensors, its mesh, and the hash of every
file, its own included.

A manifest is one line of canonical JSON, `{"body": ..., "sha256": ...}`; reading it re-makes that
line and compares, so that any changed byte is detected. It is written last: a folder without a
manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from wm_train.storage import Place

NAME = "manifest.json"
BAD = "manifest.bad"  # the manifest of a bad checkpoint in a store, which cannot rename
# with a token: in a store, where a save begins under its last name, and beside a folder that has
# the plain name and is no checkpoint of that step
STEP_FOLDER = re.compile(r"step_(\d{8}|[1-9]\d{8,})(-[0-9a-f]{8})?")
DRAFT = re.compile(STEP_FOLDER.pattern + r"\.tmp-[0-9a-f]+")
FORMAT = 1
MOST_STEPS = 10**12  # beyond any run
# bytes of an element by its kind, in the words of safetensors
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
T = TypeVar("T")


class CheckpointError(ValueError):
    """Report a checkpoint that must not be used, or could not be written, and the reason.

    passing: trying again later may help.
    """

    passing = False


class MisnamedError(CheckpointError):
    """Report a checkpoint whose folder says another step than its manifest: a copy, perhaps."""


class TakenError(CheckpointError):
    """Report that somebody else saves where this run does, so that it cannot go on."""


@dataclass(frozen=True)
class Part:
    """Locate a box of one tensor in one file. `key` is its name in the file."""

    file: str
    offset: list[int]
    shape: list[int]


@dataclass(frozen=True)
class TensorEntry:
    """Describe one logical tensor: its global shape and the parts that it consists of."""

    dtype: str
    shape: list[int]
    parts: list[Part]


@dataclass(frozen=True)
class Manifest:
    """Describe a committed checkpoint. `step` counts finished steps; `facts` holds what resuming
    compares (config, data, model, mesh)."""

    step: int
    stage: str
    facts: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, dict[str, Any]]
    format: int = FORMAT


def to_text(manifest: Manifest) -> str:
    """Return the manifest as one line of text."""
    body = _canonical(asdict(manifest))
    return f'{{"body":{body},"sha256":"{_digest(body)}"}}\n'


def read_manifest(folder: Place) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Errors: CheckpointError when it is absent, damaged, or of another format.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {folder}: got no {NAME}, expected one (it was not finished). Fix: use"
            " another checkpoint"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        outer = json.loads(text)
        body = outer["body"]
        whole = f'{{"body":{_canonical(body)},"sha256":"{_digest(_canonical(body))}"}}\n'
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {NAME} is damaged ({error}). Fix: use another checkpoint"
        ) from error
    if whole != text:
        raise CheckpointError(
            f"checkpoint {folder}: {NAME} does not match its own sha256. Fix: use another"
            " checkpoint"
        )
    version = body.get("format") if isinstance(body, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder}: got format {str(version)[:40]}, expected {FORMAT}. Fix: read it"
            " with the version that wrote it"
        )
    try:
        manifest = _from_body(body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"checkpoint {folder}: {NAME} says something impossible ({said[:300]}). Fix: use"
            " another checkpoint"
        ) from error
    named = step_of(folder)
    if named not in (-1, manifest.step):
        raise MisnamedError(
            f"checkpoint {folder}: got a folder named after step {named} with the manifest of step"
            f" {manifest.step}, expected one step. Fix: move it away, or give it its own name back"
        )
    return manifest


def same_facts(manifest: Manifest, facts: dict[str, Any]) -> bool:
    """Return True if a checkpoint was written with these facts."""
    return _canonical(manifest.facts) == _canonical(facts)


def _from_body(body: dict[str, Any]) -> Manifest:
    """Build a manifest from a JSON object. Any exception means that the object is no manifest."""
    files: dict[str, dict[str, Any]] = {
        _is(str, name): {"size": _is(int, entry["size"]), "sha256": _is(str, entry["sha256"])}
        for name, entry in body["files"].items()
    }
    left: dict[str, int] = {name: entry["size"] for name, entry in files.items()}
    tensors = {}
    for name, entry in body["tensors"].items():
        if entry["dtype"] not in DTYPE_BYTES:
            kinds = ", ".join(DTYPE_BYTES)
            raise ValueError(f"{name} is of kind {entry['dtype']!r}, expected one of {kinds}")
        shape = _sizes(entry["shape"])
        parts = [
            Part(_is(str, part["file"]), _sizes(part["offset"]), _sizes(part["shape"]))
            for part in entry["parts"]
        ]
        for part in parts:
            if part.file not in files:
                raise ValueError(f"{name} lies in {part.file!r}, which is not listed")
            if not len(part.offset) == len(part.shape) == len(shape):
                raise ValueError(f"{name} has a part of other dimensions")
            if any(
                start + size > whole
                for start, size, whole in zip(part.offset, part.shape, shape, strict=True)
            ):
                raise ValueError(f"{name} has a part outside its shape")
            left[part.file] -= math.prod(part.shape) * DTYPE_BYTES[entry["dtype"]]
            if left[part.file] < 0:
                raise ValueError(f"{part.file} is smaller than its tensors, {name} among them")
        if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
            raise ValueError(f"{name} is not covered by its parts")
        tensors[name] = TensorEntry(_is(str, entry["dtype"]), shape, parts)
    if not 0 <= _is(int, body["step"]) <= MOST_STEPS:
        raise ValueError(f"step {body['step']} is outside 0 to {MOST_STEPS:,}")
    return Manifest(
        body["step"],
        _is(str, body["stage"]),
        _checked_facts(_is(dict, body["facts"])),
        tensors,
        files,
        body["format"],
    )


def _checked_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts, each of those that the trainer reads of its own type. They may be missing:
    `resume_facts` asks for those that a run needs to go on."""
    for key, kind in {"identity": dict, "config": dict, "guard": dict, "quarantined": list}.items():
        if key in facts and not isinstance(facts[key], kind):
            raise TypeError(f"{key} is {facts[key]!r}, no {kind.__name__}")
    for name in facts.get("quarantined", []):
        _is(str, name)
    loss = facts.get("validation_loss")
    if loss is not None and (isinstance(loss, bool) or not isinstance(loss, int | float)):
        raise TypeError(f"validation_loss is {loss!r}, no number")
    guard = facts.get("guard", {})
    for loss in _is(list, guard.get("recent", [])):
        _is(float, float(_is(int, loss)) if isinstance(loss, int) else loss)
    for step in _is(list, guard.get("skipped", [])):
        _is(int, step)
    for span in _is(list, guard.get("rewound", [])):
        if len([_is(int, end) for end in _is(list, span)]) != 2:
            raise ValueError(f"guard.rewound holds {span!r}, no pair of steps")
    return facts


def resume_facts(folder: Place, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identity and the configuration of the run that wrote a checkpoint.

    Errors: CheckpointError when it does not say them.
    """
    optimizer = ("config", "recipe", "stages", manifest.stage, "optimizer")
    kinds: list[tuple[tuple[str, ...], Any]] = [
        (("identity", "data"), str),
        (("identity", "model"), dict),
        (("config", "data", "path"), str),
        ((*optimizer, "name"), str),
        ((*optimizer, "ema_decay"), int | float),
    ]
    absent = [path for path, kind in kinds if not isinstance(_at(manifest.facts, path), kind)]
    # the stage's name is a fact too, of any length
    lacks = [".".join(part[:100] for part in path) for path in absent]
    if lacks:
        raise CheckpointError(
            f"checkpoint {folder}: got no {', '.join(lacks)} among its facts, expected what the"
            " trainer writes. Fix: use another checkpoint, or name=<new run>"
        )
    return manifest.facts["identity"], manifest.facts["config"]


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of nested mappings, None where there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _is(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _sizes(values: Any) -> list[int]:
    sizes = [_is(int, value) for value in _is(list, values)]
    if any(size < 0 for size in sizes):
        raise ValueError(f"{sizes} has a negative size")
    return sizes


def check_names(folder: Place, manifest: Manifest) -> None:
    """Refuse names that lead out of the folder, and files that the manifest does not list.

    Errors: CheckpointError.
    """
    for name in manifest.files:
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(
                f"checkpoint {folder}: got file name {name!r}, expected a plain name inside the"
                " folder"
            )
    present = {p.name for p in folder.iterdir()} - {NAME}
    if present != set(manifest.files):
        missing, foreign = (
            sorted(set(manifest.files) - present),
            sorted(present - set(manifest.files)),
        )
        raise CheckpointError(
            f"checkpoint {folder}: missing files {missing}, foreign files {foreign}. Fix: use"
            " another checkpoint"
        )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def committed(root: Place) -> list[Place]:
    """Return published checkpoint folders, oldest first. Unfinished and quarantined ones have other
    names; in a store, which does not rename, an unfinished one has no manifest yet. May raise
    OSError."""
    if isinstance(root, Path):
        there = root.iterdir() if root.is_dir() else []
        folders: list[Place] = [p for p in there if STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    else:
        named = [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name)]
        folders = [p for p in named if (p / NAME).is_file()]
    return sorted(folders, key=lambda folder: (step_of(folder), folder.name))


def step_of(folder: Place) -> int:
    """Return the step in a checkpoint folder's name, -1 for another folder."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else -1
