"""Public checkpoints in and out: a diffusers directory, that is config.json and safetensors files
with an index.

Reading is strict and lazy: a missing, extra or mis-shaped tensor is an error that lists names,
before any weight changes; then every holder reads just the part of each tensor it holds. Only
safetensors is read; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wm_train.boxes import Box, local_box, local_tensor
from wm_train.config.schema import ModelConfig
from wm_train.models.sana_wm.public import (
    REPLACED_IN_SANA_VIDEO,
    SANA_VIDEO,
    config_from_public,
    public_from_config,
    sana_video_sources,
    sana_wm_sources,
)

STEM = "diffusion_pytorch_model"
GATE_OPEN = 1.2784645  # silu(x) = 1: an output gate that changes nothing
LISTED = 20  # names shown per kind of error


@dataclass(frozen=True)
class Loaded:
    """Our parameters filled from the checkpoint, and those it does not have, left as they were."""

    filled: tuple[str, ...]
    fresh: tuple[str, ...]


class PublicFiles:
    """The tensors of a public directory, opened lazily; use as a context."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads(_existing(directory / "config.json").read_text())
        index, single = (
            directory / f"{STEM}.safetensors.index.json",
            directory / f"{STEM}.safetensors",
        )
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else [single.name]
        )
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(
                f"public checkpoint cannot be read: got files {outside}, expected plain names"
                f" ({index}). Fix: use an intact copy"
            )
        self._paths = [_existing(directory / name) for name in names]
        self._open = ExitStack()

    def __enter__(self) -> PublicFiles:
        self._where: dict[str, Any] = {}
        for path in self._paths:
            handle = self._open.enter_context(safe_open(path, framework="pt"))
            self._where |= dict.fromkeys(handle.keys(), handle)
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        """A part of one tensor."""
        part = self._where[name].get_slice(name)
        return (
            part[tuple(slice(start, start + size) for start, size in zip(*box))]
            if box.shape
            else part[...]
        )


def read_config(directory: Path, base: ModelConfig | None = None) -> ModelConfig:
    """Our config for a released SANA-WM directory. Raises ValueError if it needs something we do
    not have."""
    return config_from_public(json.loads(_existing(directory / "config.json").read_text()), base)


@torch.no_grad()
def load_pretrained_(model: nn.Module, directory: Path) -> Loaded:
    """Fill the model's parameters and buffers from a SANA-WM or SANA-Video directory, each holder
    its own part.

    SANA-WM must fit name by name. SANA-Video gives its attention, FFN, text and time weights;
    patchify and output (another VAE), gates and camera branch stay as initialised, but for output
    gates, which are opened so that a block starts as SANA-Video's. Raises ValueError that lists
    missing, extra and mis-shaped tensors; nothing has changed then.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with PublicFiles(directory) as files:
        from_video = files.config.get("_class_name") == SANA_VIDEO
        sources = sana_video_sources(targets) if from_video else sana_wm_sources(targets)
        shapes = files.shapes()
        _check(targets, sources, shapes, REPLACED_IN_SANA_VIDEO if from_video else (), directory)
        for name, parts in sources.items():
            local, box = local_tensor(targets[name]), local_box(targets[name])
            if not box.empty:
                pieces = [files.read(part, piece) for part, piece in _pieces(parts, shapes, box)]
                local.copy_((torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(local.dtype))
    fresh = tuple(name for name in targets if name not in sources)
    for name in fresh if from_video else ():
        if name.endswith(("output_gate.weight", "output_gate.bias")):
            local_tensor(targets[name]).fill_(GATE_OPEN if name.endswith("bias") else 0.0)
    return Loaded(tuple(sources), fresh)


def export_pretrained(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    directory: Path,
    *,
    max_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Write whole tensors (name -> value) as a directory that diffusers' `from_pretrained` reads;
    returns its files.

    The recall_gate buffers, which nobody reads, are added where `weights` lacks them. Raises
    ValueError when the directory is not empty, or the model is none that the public class can hold.
    """
    text = json.dumps(public_from_config(config), indent=2)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"export failed: got {directory}, which is not empty, expected a new or empty"
            " directory. Fix: name another one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    buffers = {f"blocks.{i}.attn.recall_gate": torch.zeros(1) for i in range(config.depth)}
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
    for path, group in zip(files, groups):
        save_file({name: whole[name] for name in group}, path, metadata={"format": "pt"})
    if count > 1:
        index = {
            "metadata": {"total_size": sum(_size(value) for value in whole.values())},
            "weight_map": {name: path.name for path, group in zip(files, groups) for name in group},
        }
        files.append(directory / f"{STEM}.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(text)
    return [*files, directory / "config.json"]


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
        rows = sum(shapes[part][0] for part in parts)
        found = (rows, *shapes[parts[0]][1:])
        if found != tuple(targets[name].shape) or any(
            shapes[part][1:] != found[1:] for part in parts
        ):
            misshaped.append(f"{name} {found} instead of {tuple(targets[name].shape)}")
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
    """The boxes of the stacked tensors `parts` that make up `box` of their whole."""
    first = 0
    for part in parts:
        rows = shapes[part][0]
        start, stop = max(box.offset[0], first), min(box.offset[0] + box.shape[0], first + rows)
        if start < stop:
            yield part, Box((start - first, *box.offset[1:]), (stop - start, *box.shape[1:]))
        first += rows


def _groups(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut so that no group exceeds max_bytes (a larger tensor stands alone)."""
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


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"public checkpoint cannot be read: got no file {path}, expected a diffusers directory."
            " Fix: give the folder of the transformer"
        )
    return path
