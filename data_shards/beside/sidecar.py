"""Read the file of facts beside a video, and check each of them by type and value.

What is wrong ends in one DataError that names the file, the key, the value and the rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.fields import registered
from data_shards.schema import DataError, shown
from data_shards.storage.files import parse_json, read_file
from data_shards.storage.npz import MOST_BYTES, open_npz

FACTS = ("episode", "metres_per_unit", "control_names", "control_sums")  # read first, for the list
KEYS = (*FACTS, "c2w", "w2c", "intrinsics", "controls", "caption", "text", "text_mask")
OTHER_NAMES: Mapping[str, str] = {  # of other programs -> ours
    **dict.fromkeys(("extrinsics", "extrinsic", "world_to_camera", "world2cam", "w2cs"), "w2c"),
    **dict.fromkeys(("poses", "pose", "cam2world", "camera_to_world", "c2ws", "cam_c2w"), "c2w"),
    **dict.fromkeys(("K", "Ks", "k", "intrinsic", "intrinsics_matrix", "focal"), "intrinsics"),
    **dict.fromkeys(("actions", "action", "control"), "controls"),
    **dict.fromkeys(("meters_per_unit", "metre_per_unit", "scale"), "metres_per_unit"),
    "prompt": "caption",
}
# those that published JSON uses for other things: a person's poses, the label of an action
COMMON_WORDS = ("poses", "pose", "k", "focal", "actions", "action", "control", "scale", "prompt")
UNITS = (1e-9, 1e9)  # metres in one unit of length
MOST_TEXT = 2**24  # bytes of a caption


@dataclass(frozen=True)
class Sidecar:
    """Hold facts by name as they were read; `where` names the file. A JSON null counts as absent.

    names: of all that the file has, `values` may lack some of them.
    """

    where: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def error(self, key: str, rule: str, fix: str = "") -> DataError:
        """Return the error that a value breaks a rule."""
        end = f". Fix: {fix}" if fix else ""
        return DataError(
            f"sidecar: got {key} = {shown(self.values[key])}, expected {rule} ({self.where}){end}"
        )

    def numbers(self, key: str, rule: str) -> NDArray[np.float64]:
        """Return an array of finite numbers."""
        array = self.array(key)
        with np.errstate(over="ignore", invalid="ignore"):
            wide = array.astype(np.float64)
        if not np.isfinite(wide).all():
            raise self.error(key, f"{rule}, finite numbers")
        return wide

    def array(self, key: str) -> NDArray[Any]:
        """Return an array of any kind of numbers, as a field of another package has them."""
        try:
            array = np.asarray(self.values[key])
        except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise self.error(key, "numbers, and all rows of one length") from error
        if array.dtype.kind not in "biuf":
            raise self.error(key, "numbers only")
        return array

    def words(self, key: str) -> str:
        """Return a text."""
        try:
            value = item(self.values[key])
        except ValueError:  # the bytes of an npz need not be characters
            value = None
        if not isinstance(value, str) or len(value) > MOST_TEXT:
            raise self.error(key, "a text")
        return value

    @property
    def episode(self) -> str | None:
        if "episode" not in self.values:
            return None
        value = item(self.values["episode"])
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self.error("episode", "a name")
        return str(value)

    @property
    def metres_per_unit(self) -> float:
        if "metres_per_unit" not in self.values:
            return 1.0
        low, high = UNITS
        rule = f"a number from {low:g} to {high:g}"
        value = self.numbers("metres_per_unit", rule)
        if value.shape != () or not low <= value <= high:
            raise self.error("metres_per_unit", rule, "metres_per_unit=1 for poses in metres")
        return float(value)

    @property
    def control_names(self) -> tuple[str, ...]:
        names = listed(self.values.get("control_names", ()))
        if (
            names is None
            or not all(isinstance(name, str) and name and name.isprintable() for name in names)
            or len(set(names)) < len(names)
        ):
            raise self.error("control_names", "a list of different names, one for each control")
        return tuple(names)

    @property
    def control_sums(self) -> tuple[bool, ...]:
        count = len(self.control_names)
        if "control_sums" not in self.values:
            return (False,) * count
        sums = listed(self.values["control_sums"])
        if sums is None or len(sums) != count or not all(x in (0, 1) for x in sums):
            raise self.error("control_sums", f"{count} times true or false, as control_names")
        return tuple(bool(x) for x in sums)


def item(value: Any) -> Any:
    """Return a value of an npz as Python's own; ValueError for what is no character."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.shape == () else None
    return value.decode() if isinstance(value, bytes) else value


def listed(value: Any) -> list[Any] | None:
    """Return the items of a list, or of an array [N]; None of anything else."""
    if isinstance(value, np.ndarray):
        try:
            found = value.tolist() if value.ndim == 1 else None
            return found and [x.decode() if isinstance(x, bytes) else x for x in found]
        except ValueError:  # the bytes of an npz need not be characters
            return None
    return list(value) if isinstance(value, list | tuple) else None


def read_sidecar(video: Path, wanted: Iterable[str] = KEYS, most: int = MOST_BYTES) -> Sidecar:
    """Read these keys of name.npz or name.json; nothing if there is neither. most: bytes of one.

    Raises:
        DataError: both, a file that cannot be read, or keys that mean nothing here.
    """
    npz, text = video.with_suffix(".npz"), video.with_suffix(".json")
    if npz.exists() and text.exists():
        raise DataError(
            f"sidecar: got {npz.name} and {text.name}, expected one of them. Fix: merge them"
        )
    if npz.exists():
        with open_npz(npz, npz.name, "sidecar") as file:
            check_names(file.names, npz.name)
            values = {name: file.read(name, most) for name in wanted if name in file.names}
            return Sidecar(npz.name, values, file.names)
    if not text.exists():
        return Sidecar(video.name)
    found = parse_json(read_file(text, "sidecar"), "sidecar", text.name)
    check_names(found, text.name)
    return of_json(found, text.name)


def of_json(found: Mapping[str, Any], where: str) -> Sidecar:
    """Return the sidecar in a JSON object."""
    values = {name: value for name, value in found.items() if value is not None}
    return Sidecar(where, values, frozenset(values))


def check_names(names: Iterable[str], where: str, foreign: bool = False) -> None:
    """Refuse keys that would be ignored. foreign: the file may hold facts of other programs, so
    only those that seem to be ours under another name.

    Raises:
        DataError: which, and what is meant perhaps.
    """
    names = set(names)
    for name in sorted(names - {*KEYS, *registered()}):
        meant = OTHER_NAMES.get(name)
        if foreign and (meant is None or meant in names or name in COMMON_WORDS):
            continue
        near = difflib.get_close_matches(name.lower(), KEYS, 1, 0.8)
        meant = meant or (near[0] if near else None)
        fix = f"is it {meant}? Rename it" if meant else "take it out"
        raise DataError(
            f"sidecar: got the key {shown(name)}, expected some of {', '.join(KEYS)} ({where})."
            f" Fix: {fix}"
        )
