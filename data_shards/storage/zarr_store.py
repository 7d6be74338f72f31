"""Store clips too long for a tar member in Zarr v3, behind the same reader.

Fields, index and checksums are the same. A shard is a Zarr group `shards/000000.zarr` with one
group per clip. Latents have one latent frame per chunk and FRAMES_PER_FILE frames per file
(sharding codec), in order, so a range of frames is a range of bytes here, too. Nothing is
compressed: latents do not shrink. bfloat16 is stored as uint16.

Any Zarr library reads these shards. Like tars, they are written and read here without one: each
file has one right content, which follows from the index, so `verify` detects every wrong bit, and
reads have the retries, limits and cache of all others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.fields import is_by_row
from data_shards.schema import DataError, MemberEntry, check_key
from data_shards.storage.files import NPY_DESCRIPTIONS, crc32c, fresh_folder
from data_shards.storage.write import check_array, encode_array

FRAMES_PER_FILE = 64
STORED = {"bfloat16": "uint16"}  # Zarr knows no bfloat16
NOT_THERE = 2**64 - 1  # offset and length of a chunk that a file could hold and does not
DESCRIPTION = "zarr.json"
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


class Piece(NamedTuple):
    """Locate consecutive rows of a member as a range of bytes in one file of the shard's folder."""

    name: str
    offset: int
    length: int


def array_path(key: str, field: str) -> str:
    """Return the path of a member's array inside its shard."""
    return f"{key}/{field.removesuffix('.npy')}"


def pieces(key: str, member: MemberEntry, start: int, stop: int) -> Iterator[Piece]:
    """Yield the pieces of the rows [start, stop) of a member, in order."""
    size, step = (
        member.row_bytes,
        FRAMES_PER_FILE if is_by_row(member.field) else max(1, member.shape[0]),
    )
    for first in range(start - start % step, stop, step):
        low, high = max(start, first), min(stop, first + step)
        name = "/".join(
            (array_path(key, member.field), "c", str(first // step), *"0" * (len(member.shape) - 1))
        )
        yield Piece(name, (low - first) * size, (high - low) * size)


def chunk_index(count: int, size: int) -> bytes:
    """Return the end of a file with `count` chunks of `size` bytes, by the sharding codec.

    It is the offset and length of each chunk, and their checksum.
    """
    table = np.full((FRAMES_PER_FILE, 2), NOT_THERE, "<u8")
    table[:count, 0], table[:count, 1] = np.arange(count, dtype=np.uint64) * np.uint64(size), size
    data = table.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def group_description() -> bytes:
    """Return the only `zarr.json` of a group."""
    return json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def array_description(member: MemberEntry) -> bytes:
    """Return the only `zarr.json` of the array of this member."""
    dtype, by_row = STORED.get(member.dtype, member.dtype), is_by_row(member.field)
    chunk = [max(1, length) for length in member.shape]
    codec: dict[str, Any] = LITTLE if dtype != "uint8" else {"name": "bytes"}
    if by_row:
        chunk[0] = FRAMES_PER_FILE
        inner = {
            "chunk_shape": [1, *chunk[1:]],
            "codecs": [codec],
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "end",
        }
        codec = {"name": "sharding_indexed", "configuration": inner}
    facts = {
        "shape": list(member.shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [codec],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(facts, indent=2).encode()


def shard_files(members: Iterable[tuple[str, MemberEntry]]) -> dict[str, tuple[int, bytes]]:
    """Return name -> (bytes of numbers, what follows them) of every file of a shard.

    members: its (key, member) pairs.
    """
    files = {DESCRIPTION: (0, group_description())}
    for key, member in members:
        files[f"{key}/{DESCRIPTION}"] = (0, group_description())
        files[f"{array_path(key, member.field)}/{DESCRIPTION}"] = (0, array_description(member))
        for piece in pieces(key, member, 0, member.shape[0]) if member.length else ():
            rows = piece.length // member.row_bytes
            files[piece.name] = (
                piece.length,
                chunk_index(rows, member.row_bytes) if is_by_row(member.field) else b"",
            )
    return files


class ZarrWriter:
    """Write one Zarr shard; used exactly as `ShardWriter`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = fresh_folder(path.with_name(f"{path.name}.tmp-{os.getpid()}"))
        self._keys: set[str] = set()
        try:
            self._write(DESCRIPTION, group_description())
        except OSError:  # nobody will leave a context that was not entered
            shutil.rmtree(self._temporary)
            raise

    def add(
        self,
        key: str,
        arrays: Mapping[str, tuple[str, NDArray[Any]]],
        description: Mapping[str, Any],
    ) -> tuple[MemberEntry, ...]:
        """Append a clip as `ShardWriter.add` does."""
        if check_key(key) in self._keys:
            raise DataError(
                f"clip key: got {key!r} twice, expected unique keys (shard {self.path.name})"
            )
        self._keys.add(key)
        self._write(f"{key}/{DESCRIPTION}", group_description())
        text = np.frombuffer((json.dumps(description, sort_keys=True) + "\n").encode(), np.uint8)
        members = [self._append(key, "json", "uint8", text)]
        for field in sorted(arrays, key=lambda name: (is_by_row(name), name)):
            dtype, array = arrays[field]
            check_array(key, field, dtype, array)
            members.append(self._append(key, field, dtype, array))
        return tuple(members)

    def _append(self, key: str, field: str, dtype: str, array: NDArray[Any]) -> MemberEntry:
        try:
            _, data = encode_array(array, dtype)
        except DataError as error:
            raise DataError(
                f"member: {error} (shard {self.path.name}, key {key}, field {field})"
            ) from error
        rows: tuple[int, ...] = ()
        if is_by_row(field):
            stored = np.frombuffer(data, NPY_DESCRIPTIONS[dtype]).reshape(array.shape)
            rows = tuple(crc32c(row) for row in stored)
        member = MemberEntry(field, 0, len(data), 0, dtype, tuple(array.shape), crc32c(data), rows)
        view, at = memoryview(data), 0
        for name, (length, rest) in shard_files([(key, member)]).items():
            if length:
                self._write(name, view[at : at + length], rest)
                at += length
        self._write(f"{array_path(key, field)}/{DESCRIPTION}", array_description(member))
        return member

    def _write(self, name: str, *parts: bytes | memoryview) -> None:
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> ZarrWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            # what an interrupted run left under this name: a folder, unlike a file, is not replaced
            # by a rename
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self._temporary, self.path)
        else:
            shutil.rmtree(self._temporary)
