"""Read and write public checkpoints: a diffusers directory of config.json and safetensors files
with an index.

Reading is strict and lazy: a missing, extra or mis-shaped tensor is an error that lists names,
before any weight changes; then every process reads just its own part of each tensor. Only
safetensors is read; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.weight_files import COPY_AGAIN, REFUSED, STEM, PublicFiles, read_object, refusal
from wm_train.boxes import Box, local_box, local_tensor
from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import config_class, load, names
from wm_train.models.public_files import save_weights

LISTED = 20  # names shown per kind of error


@dataclass(frozen=True)
class Sources:
    """Map each of our parameters to public tensors, stacked along the first dimension.

    ignored: public tensors that none of our parameters uses; opened: initial values of parameters
    without a source, by the ending of their name.
    """

    parts: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    opened: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PublicLayout:
    """Describe a model's public checkpoints; a model's configuration names one by `public`.

    class_names: `_class_name` of the directories it reads, the one it writes first; to_public:
    configuration -> config.json; from_public: config.json, and a configuration for keys that it
    lacks -> configuration; sources: `_class_name` and our names -> `Sources`; buffers: tensors that
    an export adds. to_public and from_public raise ValueError for what cannot be represented.
    """

    class_names: tuple[str, ...]
    to_public: Callable[[Any], dict[str, Any]]
    from_public: Callable[[Mapping[str, Any], Any], ModelConfig]
    sources: Callable[[str, Iterable[str]], Sources]
    buffers: Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Loaded:
    """Record the parameters filled from the checkpoint, and those it lacks, left as they were."""

    filled: tuple[str, ...]
    fresh: tuple[str, ...]


def read_config(directory: Path, base: ModelConfig | None = None) -> ModelConfig:
    """Read our configuration from a released model's directory.

    base: gives the keys that config.json lacks. Raises ValueError if the model needs something we
    do not have.
    """
    file = directory / "config.json"
    public = read_object(file)
    try:
        return layout_of(public, directory).from_public(public, base)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        if str(error).startswith(REFUSED):
            raise
        got = f"{file} with a value of another kind ({error})"
        raise refusal(got, "numbers and lists as diffusers writes them", COPY_AGAIN) from error


def layout_of(public: Mapping[str, Any], directory: Path) -> PublicLayout:
    """Return the layout of a config.json, among those of all models. Raises ValueError for a class
    that none of them reads."""
    found, known = public.get("_class_name"), list[str]()
    for name in names("models"):  # ours first: what another package broke does not matter to them
        where = config_class("models", name).public  # type: ignore[attr-defined]
        if where:
            layout: PublicLayout = load(where)
            if found in layout.class_names:
                return layout
            known += layout.class_names
    raise ValueError(
        f"public checkpoint cannot be read: got _class_name {found!r}, expected one of"
        f" {', '.join(known)} ({directory}). Fix: use another checkpoint"
    )


@torch.no_grad()
def load_pretrained_(model: nn.Module, directory: Path) -> Loaded:
    """Fill the model's parameters and buffers from a public directory, each process its own part.

    Every name must fit, but for those that the layout ignores or leaves as initialised (SANA-Video
    as a start of SANA-WM). Raises ValueError that lists missing, extra and mis-shaped tensors;
    nothing has changed then.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    broken = list[str]()
    with PublicFiles(directory) as files:
        layout = layout_of(files.config, directory)
        sources = layout.sources(files.config["_class_name"], targets)
        shapes = files.shapes()
        _check(targets, sources.parts, shapes, sources.ignored, directory)
        files.check_floats({part for parts in sources.parts.values() for part in parts})
        for name, parts in sources.parts.items():
            local, box = local_tensor(targets[name]), local_box(targets[name])
            if not box.empty:
                pieces = [files.read(part, piece) for part, piece in _pieces(parts, shapes, box)]
                local.copy_((torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(local.dtype))
                if not all(piece.isfinite().all() for piece in pieces):
                    broken.append(name)
    if broken:
        got = f"{_listed(broken)} with NaN or infinity in {directory}"
        raise refusal(got, "finite weights", "use another checkpoint")
    fresh = tuple(name for name in targets if name not in sources.parts)
    for name in fresh:
        for ending, value in sources.opened.items():
            if name.endswith(ending):
                local_tensor(targets[name]).fill_(value)
    return Loaded(tuple(sources.parts), fresh)


def export_pretrained(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    max_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Write whole tensors (name -> value) as a directory that diffusers' `from_pretrained` reads;
    return its files.

    Buffers of the layout are added where `weights` lacks them. Raises ValueError when the directory
    is not empty or cannot be written, or the model has no public class that can hold it. An export
    that fails, or is interrupted, leaves nothing behind.
    """
    if not config.public:
        raise ValueError(
            f"export failed: got model {config.name}, which has no public layout, expected one that"
            " has. Fix: --layout file"
        )

    layout: PublicLayout = load(config.public)
    text = json.dumps(layout.to_public(config), indent=2)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"export failed: got {directory}, which is not empty, expected a new or empty"
            " directory. Fix: name another one"
        )
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    buffers = layout.buffers(config)
    whole = {
        name: value.detach().contiguous().cpu() for name, value in (buffers | dict(weights)).items()
    }
    groups = list(_groups(whole, max_bytes))
    count = len(groups)
    names = (
        [f"{STEM}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count > 1
        else [f"{STEM}.safetensors"]
    )
    files = [directory / name for name in names]
    texts = {}
    if count > 1:
        index = {
            "metadata": {"total_size": sum(_size(value) for value in whole.values())},
            "weight_map": {name: path.name for path, group in zip(files, groups) for name in group},
        }
        texts[directory / f"{STEM}.safetensors.index.json"] = json.dumps(index, indent=2)
    texts[directory / "config.json"] = text  # last: without it nobody takes the directory for one
    try:
        for path, group in zip(files, groups):
            save_weights({name: whole[name] for name in group}, path, {"format": "pt"})
        for path, words in texts.items():
            path.write_text(words)
    except BaseException as error:
        for path in (*files, *texts):
            path.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        if isinstance(error, OSError):
            raise ValueError(
                f"export failed: got {error}, expected a directory that can be written. Fix: make"
                " room, or name another one"
            ) from error
        raise
    return [*files, *texts]


def _check(
    targets: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: tuple[str, ...],
    directory: Path,
) -> None:
    wanted = {part for parts in sources.values() for part in parts}
    missing = sorted(wanted - shapes.keys())
    extra = sorted(shapes.keys() - wanted - set(ignored))
    misshaped = []
    for name, parts in sources.items():
        if any(part not in shapes for part in parts):
            continue
        shape = shapes[parts[0]]
        if len(parts) > 1:  # a scalar has no rows to stack: it stays mis-shaped
            shape = (sum((*shapes[part], 0)[0] for part in parts), *shape[1:])
        if shape != tuple(targets[name].shape) or any(
            shapes[part][1:] != shape[1:] for part in parts
        ):
            misshaped.append(f"{name} {shape} instead of {tuple(targets[name].shape)}")
    kinds = {"missing": missing, "extra": extra, "mis-shaped": misshaped}
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"public checkpoint does not fit the model: got {'; '.join(problems)}, expected equal"
            f" names and shapes ({directory}). Fix: build the model from read_config(directory)"
        )


def _pieces(
    parts: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], box: Box
) -> Iterator[tuple[str, Box]]:
    """Yield the boxes of the stacked tensors `parts` that make up `box` of the whole tensor."""
    if not box.shape:  # a scalar
        yield parts[0], box
        return
    first = 0
    for part in parts:
        rows = shapes[part][0]
        start, stop = max(box.offset[0], first), min(box.offset[0] + box.shape[0], first + rows)
        if start < stop:
            yield part, Box((start - first, *box.offset[1:]), (stop - start, *box.shape[1:]))
        first += rows


def _groups(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """Yield names in order, in groups of at most max_bytes (a larger tensor forms its own
    group)."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + _size(tensor) > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += _size(tensor)
    yield group


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (
        f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    )
