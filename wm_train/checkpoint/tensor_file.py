"""Write tensors in the safetensors format, hashed while they are written, and read them once the
hash has been checked.

We write the format ourselves (an 8-byte length, a JSON header, raw little-endian data) only to
stream it through sha256 without a second copy in memory; reading is the `safetensors` library's. No
pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_shards.storage.files import open_regular
from wm_train.errors import SetupError
from wm_train.storage import Place, Remote

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
AS_WRITTEN = "expected one as it was written. Fix: use another checkpoint"
CHUNK = 16 * 2**20  # bytes hashed at a time


class FileDigest(NamedTuple):
    """Store the size and hash of a file, as the manifest records them."""

    size: int
    sha256: str


def write_tensors(path: Place, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
    """Write host tensors to a new file, flush it to the disk, and return its size and sha256.

    Errors: FileExistsError when `path` exists (a checkpoint is never written over); OSError from
    the file system.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal written
            digest.update(data)
            file.write(data)
            written += len(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for tensor in tensors.values():
            raw = (
                tensor.detach().contiguous().reshape(tensor.numel()).view(torch.uint8).numpy().data
            )
            for start in range(0, len(raw), CHUNK):
                put(raw[start : start + CHUNK])
        _flush(path, file)
    return FileDigest(written, digest.hexdigest())


def _flush(path: Place, file: Any) -> None:
    """Flush a file to the disk. A store flushes when a file is closed."""
    if isinstance(path, Path):
        file.flush()
        os.fsync(file.fileno())


def read_digest(path: Place, most: int | None = None) -> FileDigest:
    """Return size and sha256 of a file as it is on the disk. most: bytes after which it is too long
    in any case, and the rest is left out: a web server's answer may have no end."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) if isinstance(path, Path) else path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            size += len(data)
            if most is not None and size > most:
                break
    return FileDigest(size, digest.hexdigest())


class RemoteTensors:
    """Read tensors of a file in a store by byte range: of a slice, only the rows it spans.

    Raises SetupError for a file that is not as this module writes it.
    """

    def __init__(self, file: Remote) -> None:
        self.file = file
        length = int.from_bytes(file.read(0, 8), "little")
        if not 0 < length <= MOST_HEADER:
            raise SetupError(f"{file}: got a header of {length:,} bytes, {AS_WRITTEN}")
        try:
            self.start, self.header = 8 + length, json.loads(file.read(8, 8 + length))
        except (ValueError, RecursionError) as error:
            got = f"a header that is no JSON ({error})"
            raise SetupError(f"{file}: got {got}, {AS_WRITTEN}") from error

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._rows(key, slice(None))

    def get_slice(self, key: str) -> _Slices:
        return _Slices(self, key)

    def _entry(self, key: str) -> tuple[torch.dtype, list[int], int, int]:
        """Return dtype, shape and the place [begin, end) of a tensor, behind the header."""
        kinds = {word: dtype for dtype, word in DTYPES.items()}
        try:
            word, shape = self.header[key]["dtype"], list(self.header[key]["shape"])
            begin, end = map(int, self.header[key]["data_offsets"])
            if word not in kinds:
                raise SetupError(
                    f"{self.file}: got tensor {key} of dtype {str(word)[:40]}, expected one of"
                    f" {', '.join(kinds)}. Fix: use another checkpoint"
                )
            size = math.prod(shape) * kinds[word].itemsize
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, SetupError):
                raise
            got = f"no tensor {key} ({error!r})"
            raise SetupError(f"{self.file}: got {got}, {AS_WRITTEN}") from error
        if size < 0 or begin < 0 or end - begin != size:
            got = f"tensor {key} {word} {shape} in {end - begin} bytes"
            raise SetupError(f"{self.file}: got {got}, {AS_WRITTEN}")
        return kinds[word], shape, begin, end

    def _rows(self, key: str, rows: slice) -> torch.Tensor:
        kind, shape, begin, end = self._entry(key)
        if shape:
            first, stop, _ = rows.indices(shape[0])
            row = (end - begin) // max(1, shape[0])
            begin, end, shape[0] = begin + first * row, begin + stop * row, stop - first
        data = self.file.read(self.start + begin, self.start + end) if end > begin else b""
        if len(data) != end - begin:
            raise OSError(f"{self.file}: got {len(data)} of {end - begin} bytes of {key}")
        return (
            torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)
            if data
            else torch.empty(shape, dtype=kind)
        )


class _Slices:
    """Read `slices[rows, ...]` of one tensor."""

    def __init__(self, tensors: RemoteTensors, key: str) -> None:
        self.tensors, self.key = tensors, key

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors._rows(self.key, slices[0])[(slice(None), *slices[1:])]


def write_text(path: Place, text: str) -> None:
    """Write a small new file and flush it to the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        _flush(path, file)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
