"""Zarr v3 as the container of clips too long for a tar member: the same fields, index and checksums, behind the same reader.

A shard is a Zarr group `shards/000000.zarr` with one group per clip. Latents have one latent frame per chunk and FRAMES_PER_FILE frames
per file (sharding codec), so a range of frames is a range of bytes here too. Nothing is compressed: latents do not shrink. bfloat16 lies
as uint16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.files import crc32c, fresh_folder
from data_shards.schema import READ_BY_ROW, ClipEntry, DataError, MemberEntry, ShardError, check_key
from data_shards.write import check_array, encode_array

FRAMES_PER_FILE = 64
STORED = {"bfloat16": "uint16"}  # Zarr knows no bfloat16


def import_zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise DataError("zarr: it is not installed, expected for shards in Zarr. Fix: pip install 'zarr>=3.1'") from error
    return zarr


def array_path(key: str, field: str) -> str:
    return f"{key}/{field.removesuffix('.npy')}"


def chunk_layout(field: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(chunks, shards) of an array."""
    return ((1, *shape[1:]), (FRAMES_PER_FILE, *shape[1:])) if field in READ_BY_ROW else (shape, None)


class ZarrWriter:
    """Writes one Zarr shard; used exactly as `ShardWriter`."""

    def __init__(self, path: Path) -> None:
        self._zarr = import_zarr()
        self.path = path
        self._temporary = fresh_folder(path.with_name(f"{path.name}.tmp-{os.getpid()}"))
        self._group = self._zarr.open_group(self._temporary, mode="w", zarr_format=3)
        self._keys: set[str] = set()

    def add(self, key: str, arrays: Mapping[str, tuple[str, NDArray[Any]]], description: Mapping[str, Any]) -> tuple[MemberEntry, ...]:
        """See `ShardWriter.add`."""
        if check_key(key) in self._keys:
            raise DataError(f"clip key: got {key!r} twice, expected unique keys (shard {self.path.name})")
        self._keys.add(key)
        text = np.frombuffer((json.dumps(description, sort_keys=True) + "\n").encode(), np.uint8)
        members = [self._append(key, "json", "uint8", text)]
        for field in sorted(arrays, key=lambda name: (name in READ_BY_ROW, name)):
            dtype, array = arrays[field]
            check_array(key, field, dtype, array)
            members.append(self._append(key, field, dtype, array))
        return tuple(members)

    def _append(self, key: str, field: str, dtype: str, array: NDArray[Any]) -> MemberEntry:
        try:
            _, data = encode_array(array, dtype)
        except DataError as error:
            raise DataError(f"member: {error} (shard {self.path.name}, key {key}, field {field})") from error
        stored = np.frombuffer(data, np.dtype(STORED.get(dtype, dtype)).newbyteorder("<")).reshape(array.shape)
        chunks, shards = chunk_layout(field, stored.shape)
        place = array_path(key, field)
        target = self._group.create_array(place, shape=stored.shape, dtype=stored.dtype, chunks=chunks, shards=shards, compressors=None)
        target[:] = stored
        rows = tuple(crc32c(row.tobytes()) for row in stored) if field in READ_BY_ROW else ()
        return MemberEntry(field, 0, len(data), 0, dtype, tuple(array.shape), crc32c(data), rows)

    def __enter__(self) -> ZarrWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            for file in self._temporary.rglob("*"):
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            # what an interrupted run left under this name: a folder, unlike a file, is not replaced by a rename
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(self._temporary, self.path)
        else:
            shutil.rmtree(self._temporary)


def is_whole(shard: Path, members: Iterable[tuple[str, MemberEntry]]) -> bool:
    """Whether every array (key, member) of a finished shard is there with its chunks: a cheap look, not a check of contents."""
    for key, member in members:
        folder = shard / array_path(key, member.field)
        rows = FRAMES_PER_FILE if member.field in READ_BY_ROW else max(1, member.shape[0])
        files = sum(file.is_file() for file in (folder / "c").rglob("*"))
        if not (folder / "zarr.json").is_file() or files != -(-member.shape[0] // rows):
            return False
    return True


def read_bytes(path: str, entry: ClipEntry, member: MemberEntry, start: int, stop: int) -> bytes:
    """Rows [start, stop) of a member as stored, for the reader to check. `path` is the data set's folder or URL.

    Raises:
        ShardError: the array is missing, of another shape or dtype, or its chunks do not decode.
    """
    zarr = import_zarr()
    place = f"(shard {entry.shard}, key {entry.key}, field {member.field})"
    try:
        array = zarr.open_array(f"{path}/{entry.shard}", path=array_path(entry.key, member.field), mode="r", zarr_format=3)
        if array.shape != member.shape or array.dtype != np.dtype(STORED.get(member.dtype, member.dtype)):
            raise ValueError(f"it is {array.dtype} {array.shape}, the index says {member.dtype} {member.shape}")
        # a codec that we did not write could unpack gigabytes from a small file
        layout = (array.chunks, array.shards, len(array.compressors), len(array.filters))
        if layout != (*chunk_layout(member.field, member.shape), 0, 0):
            raise ValueError(f"got chunks, shards, compressors, filters {layout}, which encode does not write")
        return np.ascontiguousarray(array[start:stop]).tobytes()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ShardError(
            f"zarr: cannot read the array ({type(error).__name__}: {error}) {place}. Fix: copy it again", entry.shard
        ) from error
