"""Read and write public checkpoints: a directory of a configuration and safetensors files with an
index.

Reading is strict and lazy: a missing, extra or mis-shaped tensor is an error that lists names,
before any weight changes; then every process reads just its own part of each tensor. Only
safetensors is read; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.weight_files import (
    COPY_AGAIN,
    DIFFUSERS,
    REFUSED,
    Form,
    PublicFiles,
    form_of,
    read_object,
    refusal,
)
from wm_train.boxes import Box, local_box, local_tensor
from wm_train.config.kinds import ModelConfig
from wm_train.config.registry import config_class, load, names
from wm_train.models.public_files import config_text, filled_at_once, is_empty, save_weights

LISTED = 20  # names shown per kind of error


@dataclass(frozen=True)
class Sources:
    """Map each of our parameters to public tensors, stacked along the first dimension.

    ignored: public tensors that none of our parameters uses; opened: initial values of parameters
    without a source, by the ending of their name. Of parameters with one public tensor, by our
    name: copies, the public tensors that repeat it, of a parameter that is tied here; columns, the
    public place of each of our columns; shapes, the public shape of the same numbers.
    """

    parts: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    opened: Mapping[str, float] = field(default_factory=dict)
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PublicLayout:
    """Describe a model's public checkpoints; a model's configuration names one by `public`.

    class_names: `_class_name` (or `model_type`) of the directories it reads, the one it writes
    first; to_public: configuration -> config.json; from_public: config.json, and a configuration
    for keys that it lacks -> configuration; sources: `_class_name` and our tensors -> `Sources`;
    buffers: tensors that an export adds; form: the files that it writes; others: of the classes
    that it also writes, configuration -> config.json. to_public and from_public raise ValueError
    for what cannot be represented.
    """

    class_names: tuple[str, ...]
    to_public: Callable[[Any], dict[str, Any]]
    from_public: Callable[[Mapping[str, Any], Any], ModelConfig]
    sources: Callable[[str, Mapping[str, Tensor]], Sources]
    buffers: Callable[[Any], dict[str, Tensor]]
    form: Form = DIFFUSERS
    others: Mapping[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)


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
    file = directory / form_of(directory).config
    public = read_object(file)
    try:
        return layout_of(public, directory).from_public(public, base)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        if str(error).startswith(REFUSED):
            raise
        got = f"{file} with a value of another kind ({error})"
        raise refusal(got, "numbers and lists as diffusers writes them", COPY_AGAIN) from error


def layout_of(public: Mapping[str, Any], directory: Path) -> PublicLayout:
    """Return the layout of a configuration, among those of all models. Raises ValueError for a
    class that none of them reads."""
    found, known = class_name(public), list[str]()
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


def class_name(public: Mapping[str, Any]) -> Any:
    """Return the class that a configuration is of: its `_class_name`, else its `model_type`."""
    return public.get("_class_name", public.get("model_type"))


@torch.no_grad()
def load_pretrained_(model: nn.Module, directory: Path) -> Loaded:
    """Fill the model's parameters and buffers from a public directory, each process its own part.

    Every name must fit, but for those that the layout ignores or leaves as initialised (SANA-Video
    as a start of SANA-WM). Raises ValueError that lists missing, extra and mis-shaped tensors, or
    unequal copies of a tied one; nothing has changed then.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    broken = list[str]()
    with PublicFiles(directory) as files:
        layout = layout_of(files.config, directory)
        sources = layout.sources(class_name(files.config), targets)
        shapes = files.shapes()
        _check(targets, sources, shapes, directory)
        used = {part for parts in sources.parts.values() for part in parts}
        files.check_floats(used.union(*sources.copies.values()))
        _check_copies(files, sources, targets)
        for name in sources.parts:
            local, box = local_tensor(targets[name]), local_box(targets[name])
            if not box.empty:
                read = _read(files, sources, shapes, name, tuple(targets[name].shape), box)
                local.copy_(read.to(local.dtype))
                if not read.isfinite().all():
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
    native: bool = False,
) -> list[Path]:
    """Write whole tensors (name -> value) as a directory that diffusers' `from_pretrained` reads,
    or, native, that the code of the model's authors reads; return its files.

    Buffers of the layout are added where `weights` lacks them. Raises ValueError when the directory
    is not empty or cannot be written, or the model has no public class that can hold it. An export
    that fails, or is interrupted, leaves nothing behind, one that is killed a draft that the next
    one removes.
    """
    if not config.public:
        raise ValueError(
            f"export failed: got model {config.name}, which has no public layout, expected one that"
            " has. Fix: --layout file"
        )

    layout: PublicLayout = load(config.public)
    written = next(iter(layout.others), "") if native else layout.class_names[0]
    if not written:
        raise ValueError(
            f"export failed: got layout native for model {config.name}, which has one public layout"
            " only, expected diffusers. Fix: --layout diffusers"
        )
    to_config = layout.others.get(written, layout.to_public)
    text = config_text(to_config(config), layout.form)
    if not is_empty(directory):
        raise ValueError(
            f"export failed: got {directory}, which is not empty, expected a new or empty"
            " directory. Fix: name another one"
        )
    own = layout.buffers(config) | dict(weights)
    whole = to_public(own, layout.sources(written, own))
    groups = list(_groups(whole, max_bytes))
    count, stem = len(groups), layout.form.stem
    files = (
        [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count > 1
        else [f"{stem}.safetensors"]
    )
    texts = {}
    if count > 1:
        index = {
            "metadata": {"total_size": sum(_size(value) for value in whole.values())},
            "weight_map": {name: file for file, group in zip(files, groups) for name in group},
        }
        texts[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2)
    # the configuration last: without it nobody takes the directory for a checkpoint
    texts[layout.form.config] = text
    try:
        with filled_at_once(directory, layout.form.config) as draft:
            for file, group in zip(files, groups):
                # a copy of each: the format refuses tied tensors that share their memory
                part = {name: whole[name].clone() for name in group}
                save_weights(part, draft / file, {"format": "pt"})
            for file, words in texts.items():
                (draft / file).write_text(words)
    except OSError as error:
        raise ValueError(
            f"export failed: got {error}, expected a directory that can be written. Fix: make"
            " room, or name another one"
        ) from error
    return [directory / file for file in (*files, *texts)]


def to_public(own: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """Return the public tensors of ours by name; copies of a tied one share its memory."""
    public: dict[str, Tensor] = {}
    for name, tensor in own.items():
        (part,) = sources.parts[name]
        value = tensor.detach().contiguous().cpu()
        if name in sources.columns:
            value = torch.empty_like(value).index_copy_(1, _columns(sources, name), value)
        value = value.reshape(sources.shapes.get(name, value.shape))
        public |= dict.fromkeys((part, *sources.copies.get(name, ())), value)
    return public


def _columns(sources: Sources, name: str) -> Tensor:
    """Return the public place of each of our columns, int64."""
    return torch.tensor(sources.columns[name], dtype=torch.int64)


def _read(
    files: PublicFiles,
    sources: Sources,
    shapes: Mapping[str, tuple[int, ...]],
    name: str,
    shape: tuple[int, ...],
    box: Box,
) -> Tensor:
    """Read the part `box` of one of our parameters, of this whole shape."""
    parts = sources.parts[name]
    if name in sources.shapes:
        (part,) = parts
        whole = files.read(part, Box((0,) * len(shapes[part]), shapes[part]))
        return whole.reshape(shape)[_slices(box)]
    if name in sources.columns:
        (part,) = parts
        rows = files.read(part, Box((box.offset[0], 0), (box.shape[0], shapes[part][1])))
        return rows[:, _columns(sources, name)][:, _slices(box)[1]]
    pieces = [files.read(part, piece) for part, piece in _pieces(parts, shapes, box)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box))


def _check_copies(files: PublicFiles, sources: Sources, targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError that names the copies of tied tensors that differ from the first, in this
    process's part of them."""
    unequal = list[str]()
    for name, copies in sources.copies.items():
        (part,), box = sources.parts[name], local_box(targets[name])
        if not box.empty:
            first = files.read(part, box)
            unequal += [copy for copy in copies if not torch.equal(files.read(copy, box), first)]
    if unequal:
        got = f"{_listed(unequal)} unlike the first of the blocks, which share one tensor"
        raise refusal(got, "equal copies", "use a checkpoint of a tied model")


def _check(
    targets: Mapping[str, Tensor],
    sources: Sources,
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
) -> None:
    wanted = {part for parts in sources.parts.values() for part in parts}
    wanted = wanted.union(*sources.copies.values())
    missing = sorted(wanted - shapes.keys())
    extra = sorted(shapes.keys() - wanted - set(sources.ignored))
    misshaped = []
    for name, parts in sources.parts.items():
        if any(part not in shapes for part in parts):
            continue
        shape = shapes[parts[0]]
        if len(parts) > 1:  # a scalar has no rows to stack: it stays mis-shaped
            shape = (sum((*shapes[part], 0)[0] for part in parts), *shape[1:])
        expected = sources.shapes.get(name, tuple(targets[name].shape))
        if shape != expected or any(shapes[part][1:] != shape[1:] for part in parts):
            misshaped.append(f"{name} {shape} instead of {expected}")
        for copy in sources.copies.get(name, ()):
            if copy in shapes and shapes[copy] != expected:
                misshaped.append(f"{copy} {shapes[copy]} instead of {expected}")
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
