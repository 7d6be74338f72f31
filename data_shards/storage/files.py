"""Share file helpers among the writers: checksums, atomic publication, and `.npy` headers.

The headers are made without numpy's pickle support.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import ITEM_BYTES, DataError, shown

MOST_SAID = 200  # characters of what a library says: some repeat the bytes they cannot read
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
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # half a file takes room on a disk that may have none
        temporary.unlink(missing_ok=True)
        raise


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
    return parse_json(read_file(path, what), what, str(path))


def parse_json(data: bytes, what: str, where: str) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file, which may begin with a byte-order mark.

    Raises:
        DataError: not JSON, numbers or nesting beyond every use, a key that comes twice, or not an
        object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {shown(twice)} comes twice")
        return found

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError, MemoryError) as error:
        deep = isinstance(error, RecursionError)
        why = "it is nested too deep" if deep else f"it is not JSON: {error_text(error)}"
        raise DataError(
            f"{what}: cannot read {where} ({why}), expected a JSON object in UTF-8. Fix: write it"
            " again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{what}: got {shown(value)} in {where}, expected a JSON object")
    return value


def read_text(path: Path, what: str) -> str:
    """Read a text file in UTF-8, which may begin with a byte-order mark.

    Raises:
        DataError: no such file, or other bytes than text.
    """
    try:
        return read_file(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{what}: got {path}, which is no UTF-8 (byte {error.start}), expected text. Fix:"
            f" iconv -t utf-8 -f <its encoding> {path.name}"
        ) from error


def read_file(path: Path, what: str) -> bytes:
    """Read a whole file; refuse a pipe or device, which may never end.

    Raises:
        DataError: no such file, or one that cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(
            f"{what}: got no file {path.name} in {path.parent}, expected one. Fix: give the folder"
            " that holds it"
        ) from None
    except (OSError, MemoryError) as error:
        raise DataError(
            f"{what}: cannot read {path} ({error_text(error)}), expected a file. Fix: copy it again"
        ) from error


class NotRegular(OSError):
    """Report a pipe, socket, device or folder in place of a file: reading could wait for ever."""


def open_regular(path: Path | str) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: none there, or NotRegular.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            check_regular(os.fstat(number).st_mode)
        except NotRegular as error:
            raise NotRegular(error.errno, error.strerror, str(path)) from None
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def check_regular(mode: int) -> None:
    """Raise NotRegular unless a file's mode is that of a regular file."""
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise NotRegular(errno.EINVAL, f"it is {kind}, expected a regular file")


def error_text(error: BaseException) -> str:
    """Return what an exception says, on one line and short; its kind where it says nothing."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(said.split()) or type(error).__name__
    return line if len(line) <= MOST_SAID else f"{line[:MOST_SAID]}..."
