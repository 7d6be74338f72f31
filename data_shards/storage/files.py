"""Share file helpers among the writers: checksums, atomic publication, and `.npy` headers.

The headers are made without numpy's pickle support.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import ITEM_BYTES, DataError

NPY_MAGIC = b"\x93NUMPY\x01\x00"
INFINITY_BITS = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F80_0000,
    "float64": 0x7FF0_0000_0000_0000,
}
NPY_DESCRIPTIONS = {
    "uint8": "|u1",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
}


@cache
def _checksum() -> Callable[..., int]:
    # its vector instructions check twice as fast as the crc32 instruction that others use
    from awscrt.checksums import crc32c

    return cast(Callable[..., int], crc32c)


def crc32c(data: bytes | memoryview | NDArray[Any], previous: int = 0) -> int:
    """Return the CRC-32C of contiguous data, or of what gave `previous` followed by it.

    Other threads run meanwhile.
    """
    return _checksum()(data, previous)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the only header that is written and accepted for this dtype and shape.

    Format 1.0, C order, padded to 64 bytes.
    """
    dimensions = "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
    body = (
        f"{{'descr': '{NPY_DESCRIPTIONS[dtype]}', 'fortran_order': False, 'shape': {dimensions}, }}"
    )
    length = -(-(10 + len(body) + 1) // 64) * 64
    return (
        NPY_MAGIC
        + (length - 10).to_bytes(2, "little")
        + body.ljust(length - 11).encode("ascii")
        + b"\n"
    )


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Convert float32 to the upper half of its bits, rounded to nearest even. Not for NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert the bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def array_from_bytes(
    data: bytes | memoryview | NDArray[np.uint8], dtype: str, shape: tuple[int, ...]
) -> NDArray[Any]:
    """Convert raw little-endian elements to an array, without a copy.

    bfloat16 is returned as its bits in uint16.
    """
    assert len(data) == int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype], (
        "callers check the length"
    )
    return np.frombuffer(data, NPY_DESCRIPTIONS[dtype]).reshape(shape)


def as_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Convert the result of `array_from_bytes` to numbers to compute with."""
    return from_bfloat16(stored) if dtype == "bfloat16" else stored.astype(np.float32)


def all_finite(stored: NDArray[Any], dtype: str) -> bool:
    """Return True if no element is NaN or infinite.

    As integers those are the largest of either sign, so two vectorised maxima are enough.
    """
    if not stored.size or dtype == "uint8":
        return True
    bits, sign = INFINITY_BITS[dtype], 1 << (8 * stored.itemsize - 1)
    return (
        int(stored.view(f"<i{stored.itemsize}").max()) < bits
        and int(stored.view(f"<u{stored.itemsize}").max()) < sign + bits
    )


def write_durably(path: Path, data: bytes) -> None:
    """Write, fsync and rename, so that the file is either complete or absent."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place and make the rename durable."""
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fresh_folder(path: Path) -> Path:
    """Create an empty folder, removing what was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def read_selection(path: str) -> tuple[str, list[str]]:
    """Read a file written by `data_shards.filter`.

    Returns (fingerprint of its data set, keys of the clips to keep).

    Raises:
        DataError: no such file, or not of that form.
    """
    chosen = read_json(Path(path), "selection")
    fingerprint, kept = chosen.get("dataset_fingerprint"), chosen.get("kept")
    if (
        not isinstance(fingerprint, str)
        or not isinstance(kept, list)
        or not all(isinstance(key, str) for key in kept)
    ):
        raise DataError(
            f"selection: got {path} without dataset_fingerprint or kept, expected what `filter`"
            " writes. Fix: filter again"
        )
    return fingerprint, kept


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        DataError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{what}: got no file {path.name} in {path.parent}, expected one. Fix: give the folder"
            " that holds it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{what}: cannot read {path} ({error}), expected a JSON object") from error
    if not isinstance(value, dict):
        raise DataError(f"{what}: got {type(value).__name__} in {path}, expected a JSON object")
    return value
