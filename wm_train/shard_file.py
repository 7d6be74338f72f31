"""One file of tensors in the safetensors format, hashed while it is written and never trusted before its hash agreed.

We write the format ourselves (an 8-byte length, a JSON header, raw little-endian data) only to stream it through sha256 without a second
copy in memory; reading is the `safetensors` library's. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

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
CHUNK = 16 * 2**20  # bytes hashed at a time


class FileDigest(NamedTuple):
    """What the manifest remembers of a file."""

    size: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
    """Write host tensors to a new file, flush it to the disk, and return its size and sha256.

    Errors: FileExistsError when `path` exists (a checkpoint is never written over); OSError from the file system.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
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
            raw = tensor.detach().contiguous().reshape(tensor.numel()).view(torch.uint8).numpy().data
            for start in range(0, len(raw), CHUNK):
                put(raw[start : start + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(written, digest.hexdigest())


def read_digest(path: Path) -> FileDigest:
    """Size and sha256 of a file as it lies on the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            size += len(data)
    return FileDigest(size, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Write a small new file and flush it to the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
