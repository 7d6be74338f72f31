"""Read the files of a public checkpoint: a configuration, an index, safetensors files.

Two forms: config.json beside diffusion_pytorch_model.safetensors, as diffusers writes it, and
config.yaml beside model.safetensors. Only safetensors is read; nothing is ever unpickled. Every
file is somebody else's, so what it is gets checked: each mistake is one ValueError with the file
and the fix.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 1 << 20  # of a configuration
REFUSED = "public checkpoint cannot be read: "
COPY_AGAIN = "copy or download it again"
FLOATS = ("F64", "F32", "F16", "BF16")  # 8-bit kinds are meaningless without their scales
LISTED = 5
POINTER = b"version https://git-lfs"
OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf")


@dataclass(frozen=True)
class Form:
    """Name the files of one form of a checkpoint: the configuration, and its weights without
    their ending."""

    config: str
    stem: str


DIFFUSERS = Form("config.json", "diffusion_pytorch_model")
PLAIN = Form("config.yaml", "model")


def form_of(directory: Path) -> Form:
    """Return the form of a checkpoint; diffusers' where there is no configuration at all."""
    plain = (directory / PLAIN.config).is_file() and not (directory / DIFFUSERS.config).exists()
    return PLAIN if plain else DIFFUSERS


def is_release(directory: Path) -> bool:
    """Return True for a folder with the configuration of a public checkpoint, of either form."""
    return (directory / form_of(directory).config).is_file()


def refusal(got: str, rule: str, fix: str) -> ValueError:
    """Return the error for a file that is not what it should be."""
    return ValueError(f"{REFUSED}got {got}, expected {rule}. Fix: {fix}")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object, or the YAML mapping, in a file. Raises ValueError with the file for
    anything else."""
    yaml = path.suffix == ".yaml"
    rule = "a YAML mapping without aliases" if yaml else "a JSON object, as diffusers writes it"
    _existing(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
        found = _from_yaml(text) if yaml else json.loads(text)
    except OSError as error:
        got = f"{path}, which cannot be opened ({error.strerror})"
        raise refusal(got, rule, "its permissions") from error
    except (ValueError, RecursionError) as error:
        raise _judged(path, rule, error) from error
    if not isinstance(found, dict):
        raise refusal(f"{path}, which holds a {type(found).__name__}", rule, COPY_AGAIN)
    return found


def _from_yaml(text: str) -> Any:
    """Parse a small YAML text. Raises ValueError for a large one, and for aliases, which let a
    small one stand for a huge value."""
    import yaml

    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} characters")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("an alias")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class PublicFiles:
    """Read the tensors of a public directory lazily; use as a context manager."""

    def __init__(self, directory: Path) -> None:
        form = form_of(directory)
        self.config = read_object(directory / form.config)
        self._directory, self._open = directory, ExitStack()
        self._index = directory / f"{form.stem}.safetensors.index.json"
        self._listed = _weight_map(self._index) if self._index.is_file() else {}
        single = f"{form.stem}.safetensors"
        names = sorted(set(self._listed.values())) if self._index.is_file() else [single]
        self._paths = [_existing(directory / name) for name in names]

    def __enter__(self) -> PublicFiles:
        self._where: dict[str, Any] = {}
        twice, holders = list[str](), dict[str, set[str]]()
        try:
            for path in self._paths:
                handle = self._open.enter_context(open_tensors(path))
                for name in handle.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                    holders.setdefault(name, set()).add(path.name)
                    if name in self._listed and self._listed[name] != path.name:
                        continue  # a second copy: the index says which one counts
                    if name in self._where:
                        twice.append(name)
                    self._where[name] = handle
            lost = sorted(name for name in self._listed if name not in self._where)
            if lost:
                elsewhere = ", ".join(sorted(holders.get(lost[0], set()))) or "no listed file"
                got = f"{lost[0]} in {elsewhere}"
                more = f" (and {len(lost) - 1} more like it)" if len(lost) > 1 else ""
                rule = f"it in {self._listed[lost[0]]}, as {self._index} says{more}"
                raise refusal(got, rule, COPY_AGAIN)
            if twice:
                files = " and ".join(sorted(holders[twice[0]]))
                rule = f"each tensor in one file, or its file in {self._index}"
                raise refusal(f"{twice[0]} in {files} of {self._directory}", rule, COPY_AGAIN)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._where.items()
        }

    def check_floats(self, names: Collection[str]) -> None:
        """Raise ValueError if one of these tensors is of a kind that is no weight by itself."""
        kinds = {name: str(self._where[name].get_slice(name).get_dtype()) for name in sorted(names)}
        check_kinds(kinds, self._directory)

    def read(self, name: str, box: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """Read a part of one tensor: (offset, shape), a number for each dimension."""
        part, (offset, shape) = self._where[name].get_slice(name), box
        found: Tensor = (
            part[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
            if shape
            else part[...]
        )
        return found


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file of an index."""
    found = read_object(index).get("weight_map")
    rule = "weight_map, an object of tensor names and file names"
    if not isinstance(found, dict) or not found:
        got = "no weight_map" if found is None else f"weight_map {str(found)[:60]!r}"
        raise refusal(f"{index} with {got}", rule, COPY_AGAIN)
    wrong = {
        name: file
        for name, file in found.items()
        if not isinstance(file, str) or Path(file).name != file
    }
    if wrong:
        files = sorted({str(file) for file in wrong.values()})[:LISTED]
        raise refusal(f"files {files}", f"plain names ({index})", "use an intact copy")
    return dict(found)


def check_kinds(kinds: Mapping[str, str], where: Path) -> None:
    """Raise ValueError for a tensor (name -> kind, as safetensors calls it) of a kind that is no
    weight by itself."""
    wrong = [f"{name} {kind}" for name, kind in kinds.items() if kind not in FLOATS]
    if wrong:
        shown = ", ".join(wrong[:LISTED])
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        rule = f"weights of {', '.join(FLOATS)}, as quantised ones need their scales"
        fix = "download the checkpoint that is not quantised"
        raise refusal(f"{shown}{more} in {where}", rule, fix)


def open_tensors(path: Path) -> Any:
    """Open a safetensors file. Raises ValueError with what it is for anything else."""
    from safetensors import SafetensorError, safe_open

    rule = "a safetensors file"
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        got = f"{path}, which cannot be opened ({error})"
        raise refusal(got, rule, "its permissions") from error
    except (SafetensorError, ValueError) as error:
        raise _judged(path, rule, error) from error


def _judged(path: Path, rule: str, error: Exception) -> ValueError:
    """Return the error for a file that cannot be read, by what its first bytes say it is."""
    with path.open("rb") as file:
        start = file.read(64)
    fix = COPY_AGAIN
    if not start:
        kind = "which is empty"
    elif start.startswith(POINTER):
        kind, fix = "a git-lfs pointer instead of the file", f"git lfs pull, in {path.parent}"
    elif start.lstrip()[:1] == b"<":
        kind = "a web page instead of the file"
    elif start[:2] == b"PK" or start[:1] == b"\x80":
        kind = "a pickle, which may run code and is never opened"
        fix = "use the safetensors release of this checkpoint"
    else:
        kind = f"damaged or cut short at {path.stat().st_size:,} bytes ({error})"
    return refusal(f"{path}, {kind}", rule, fix)


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    others = sorted(f.name for pattern in OTHERS for f in path.parent.glob(pattern))
    here = f" (there: {', '.join(others[:LISTED])})" if others else ""
    gone = f"a broken link {path}" if path.is_symlink() else f"no file {path}"
    fix = "give the folder of the transformer"
    if others and path.suffix == ".safetensors":
        fix = f"the safetensors release of this checkpoint, its weights named {path.name}"
    rule = f"a directory with {DIFFUSERS.config} or {PLAIN.config} and its weights"
    raise refusal(f"{gone}{here}", rule, fix)


def load_network(kind: Any, model: str) -> Any:
    """Load a network of transformers in float32. kind: its class; model: a folder or hub name.

    Raises ValueError where weights are missing, which the library would draw at random, and
    whatever the library raises.
    """
    import torch

    # safetensors only: a pickled checkpoint could run code
    network, report = kind.from_pretrained(
        model,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"no weights for {missing[0]} and {len(missing) - 1} more")
    return network
