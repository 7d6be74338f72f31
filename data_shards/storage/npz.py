"""Read arrays of numbers and text from `.npz` and `.npy` files that somebody else made.

The header of an array is judged before its data is read: nothing is unpickled, and no array is made
that its file cannot hold or that is larger than what is asked for.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.storage.files import crc32c, error_text, open_regular

KINDS = "biufUS"  # dtypes that hold no pickles
MOST_BYTES = 2**28  # of one array beside a clip, unless the caller says more
ZIP, NPY = b"PK", b"\x93NUMPY"


class Npz:
    """Read an open npz file; made by `open_npz`."""

    def __init__(self, archive: zipfile.ZipFile, where: str, what: str) -> None:
        self.where, self._what, self._archive = where, what, archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in self._members:
                raise self.error(f"the array {name!r} comes twice")
            self._members[name] = info

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._members)

    def read(self, name: str, most: int = MOST_BYTES) -> NDArray[Any]:
        """Return an array of at most so many bytes.

        Raises:
            DataError: no such array, one of other things than numbers and text, or damage.
        """
        if name not in self._members:
            raise self.error(f"it has no array {name!r}")
        try:
            with self._archive.open(self._members[name]) as file:
                return read_array(file, self._members[name].file_size, most)
        except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for wrong bytes
            raise self.error(f"array {name!r}: {error_text(error)}") from error

    def error(self, why: str) -> DataError:
        return unreadable(self.where, self._what, why)


@contextmanager
def open_npz(file: Path | bytes, where: str, what: str) -> Iterator[Npz]:
    """Open an npz file, or its bytes. where, what: its name and purpose in messages.

    Raises:
        DataError: no npz.
    """
    try:
        stream: BinaryIO = io.BytesIO(file) if isinstance(file, bytes) else open_regular(file)
    except OSError as error:
        raise unreadable(where, what, error_text(error)) from error
    with stream:
        head = stream.read(len(NPY))
        if head == NPY:
            raise unreadable(where, what, "it is one array without a name, as np.save writes it")
        stream.seek(0)
        try:
            archive = zipfile.ZipFile(stream)
        except Exception as error:  # as above
            raise unreadable(where, what, error_text(error) if head else "it is empty") from error
        with archive:
            yield Npz(archive, where, what)


def read_npy(data: bytes, most: int = MOST_BYTES) -> NDArray[Any]:
    """Return the array in the bytes of an `.npy` file.

    Raises:
        ValueError: damage, other things than numbers and text, or more than so many bytes.
    """
    try:
        return read_array(io.BytesIO(data), len(data), most)
    except Exception as error:  # as above
        raise ValueError(error_text(error)) from error


def read_array(file: Any, size: int, most: int) -> NDArray[Any]:
    """Read an array from an open `.npy` file of so many bytes."""
    shape, fortran, dtype, start = read_header(file)
    if dtype.kind not in KINDS or not dtype.itemsize:
        raise ValueError(f"got dtype {dtype}, expected numbers or text without pickles")
    count = math.prod(shape) * dtype.itemsize
    if start + count != size:
        raise ValueError(f"got {dtype} {shape}, which is {count} bytes, in {size - start}")
    if count > most:
        raise ValueError(f"got {dtype} {shape}, which is {count} bytes, expected at most {most}")
    data = file.read(count)
    if len(data) != count or file.read(1):  # reading to the end checks a zip's checksum
        raise ValueError(f"got {len(data)} bytes, expected {count}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return (shape, True if in Fortran order, dtype, bytes of the header) of an open `.npy`
    file."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"got npy format {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = readers[version](file)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError(f"got shape {shape}, expected lengths")
    return tuple(shape), fortran, dtype, file.tell()


def unreadable(where: str, what: str, why: str) -> DataError:
    return DataError(
        f"{what}: cannot read {where} ({why}), expected an npz of named arrays without pickles."
        " Fix: write it again with np.savez"
    )


def embedding_from_bytes(data: bytes, crc: int, width: int, where: str) -> NDArray[np.float32]:
    """Return the embedding [L0, E] of a text beside the clips, verified.

    Raises:
        DataError: other bytes than were written, or not finite numbers [L0, width].
    """
    name = where.rsplit("/", 1)[-1].removesuffix(".npy").replace("_", " ")
    if crc32c(data) != crc:
        raise DataError(
            f"{name}: got other bytes than were written ({where}). Fix: copy it again or encode"
            " again"
        )
    try:
        array = read_npy(data)
        if array.ndim != 2 or array.shape[1] != width or array.dtype.kind != "f":
            raise ValueError(f"got {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("got NaN or infinite numbers")
    except ValueError as error:
        raise DataError(
            f"{name}: {error}, expected finite numbers [L0, {width}] ({where}). Fix: encode again"
        ) from error
    return array.astype(np.float32)
