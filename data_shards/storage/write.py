"""Write clips as WebDataset tars with a Parquet index and dataset.json.

Equal input gives equal bytes: neither clock, user nor file order matters. Order of publication: a
tar appears under its name when complete; the index and then dataset.json are written last, and
without dataset.json a folder is no data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_shards.fields import field_of, is_by_row, known_members
from data_shards.schema import (
    MAX_MEMBER_BYTES,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    check_key,
    index_schema,
)
from data_shards.storage.files import all_finite, crc32c, npy_header, to_bfloat16

BLOCK = 512
ROW_GROUP = 256  # clips whose index rows are decoded together


def encode_array(array: NDArray[Any], dtype: str) -> tuple[bytes, bytes]:
    """Return (npy header, little-endian elements) of the array stored as `dtype`.

    A float type rounds to the nearest number that it has; an integer type takes whole numbers only.

    Raises:
        DataError: values that are not finite, or that `dtype` cannot hold.
    """
    if array.dtype.kind not in "fiu":
        raise DataError(f"got an array of dtype {array.dtype}, expected numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("got NaN or infinite values, expected finite ones")
    check_range(array, dtype)
    if dtype == "bfloat16":
        stored: NDArray[Any] = to_bfloat16(array.astype(np.float32)).astype("<u2")
    else:
        stored = np.ascontiguousarray(array).astype(np.dtype(dtype).newbyteorder("<"))
    return npy_header(dtype, tuple(array.shape)), stored.tobytes()


def check_range(array: NDArray[Any], dtype: str) -> None:
    """Raise DataError for finite numbers that become infinite in `dtype`, or that wrap or lose
    their fraction in an integer type, as numpy's conversion does without a word."""
    if not array.size:
        return
    ends = [array.min(), array.max()]
    whole = np.dtype(dtype).kind in "iu" if dtype != "bfloat16" else False
    if whole:
        least, most = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        wrong = [end for end in ends if not least <= end <= most]
        if not wrong and array.dtype.kind == "f":
            wrong = list(array[array != np.floor(array)][:1])
        rule = f"whole numbers from {least} to {most}, which {dtype} can hold"
    else:
        wrong = [end for end in ends if not fits(end, dtype)]
        rule = f"values that {dtype} can hold"
    if wrong:
        fix = ". Fix: latent_dtype=bfloat16" if dtype == "float16" else ""
        raise DataError(f"got the value {wrong[-1]:g}, expected {rule}{fix}")


def fits(value: Any, dtype: str) -> bool:
    """Return True if a finite number, rounded to a float type, is finite still."""
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return bool(np.isfinite(np.asarray(value).astype(dtype)))
        narrow = np.asarray(value).astype(np.float32)
        return bool(np.isfinite(narrow)) and all_finite(to_bfloat16(narrow), dtype)


def tar_header(name: str, length: int) -> bytes:
    """Return the only 512-byte header of a member of this name and length: no time, no owner."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = length, 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT)


def check_array(key: str, field: str, dtype: str, array: NDArray[Any]) -> None:
    """Raise DataError unless field, stored dtype and number of dimensions are on the list."""
    row = field_of(field)
    if row is None or dtype not in row.dtypes or array.ndim != row.dimensions:
        raise DataError(
            f"member: got {field!r} {dtype} {array.shape}, expected one of {known_members()} (key"
            f" {key})"
        )


class ShardWriter:
    """Write one tar. Use as a context manager: a normal exit publishes the file.

    An exception leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._file = io.BufferedWriter(io.FileIO(self._temporary, "w"))
        self._position = 0
        self._keys: set[str] = set()

    def add(
        self,
        key: str,
        arrays: Mapping[str, tuple[str, NDArray[Any]]],
        description: Mapping[str, Any],
    ) -> tuple[MemberEntry, ...]:
        """Append a clip and return its members.

        arrays: field -> (stored dtype, array); description: becomes the `json` member, written
        first. Members that are read by row come last, so all replicated members of a clip are one
        contiguous range.
        """
        if check_key(key) in self._keys:
            raise DataError(
                f"clip key: got {key!r} twice, expected unique keys (shard {self.path.name})"
            )
        self._keys.add(key)
        text = (json.dumps(description, sort_keys=True) + "\n").encode()
        members = [self._append(key, "json", b"", text, "uint8", (len(text),))]
        for field in sorted(arrays, key=lambda name: (is_by_row(name), name)):
            dtype, array = arrays[field]
            check_array(key, field, dtype, array)
            try:
                header, data = encode_array(array, dtype)
            except DataError as error:
                raise DataError(
                    f"member: {error} (shard {self.path.name}, key {key}, field {field})"
                ) from error
            members.append(self._append(key, field, header, data, dtype, tuple(array.shape)))
        return tuple(members)

    def _append(
        self, key: str, field: str, header: bytes, data: bytes, dtype: str, shape: tuple[int, ...]
    ) -> MemberEntry:
        length = len(header) + len(data)
        if length > MAX_MEMBER_BYTES:
            raise DataError(
                f"member size: got {length} bytes, expected at most {MAX_MEMBER_BYTES} (key {key},"
                f" field {field})"
            )
        self._write(tar_header(f"{key}.{field}", length))
        offset = self._position
        self._write(header)
        self._write(data)
        self._write(b"\0" * (-length % BLOCK))
        row = len(data) // shape[0] if is_by_row(field) else 0
        rows = (
            tuple(crc32c(memoryview(data)[i * row : (i + 1) * row]) for i in range(shape[0]))
            if row
            else ()
        )
        return MemberEntry(
            field, offset, length, offset + len(header), dtype, shape, crc32c(header + data), rows
        )

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._write(b"\0" * (2 * BLOCK))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        finally:
            # on a full disk closing writes, and fails, once more
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def shard_size(members: Iterable[MemberEntry]) -> int:
    """Return the size that a tar ending with the last of these members must have."""
    end = max(member.offset + member.length for member in members)
    return end + (-end % BLOCK) + 2 * BLOCK


def sums_text(digests: Mapping[str, str]) -> str:
    """Return the content of SHA256SUMS, given the SHA-256 of each file by name.

    `sha256sum -c SHA256SUMS` reads it, too.
    """
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def index_writer(file: Path | BinaryIO) -> Any:
    """Return the ParquetWriter of an index.

    Pages have checksums, which the reader verifies; there are no statistics, as nothing reads them.
    """
    import pyarrow.parquet as pq

    return pq.ParquetWriter(
        file, index_schema(), compression="zstd", write_page_checksum=True, write_statistics=False
    )


def write_index(
    file: Path | BinaryIO, rows: Sequence[tuple[ClipEntry, tuple[MemberEntry, ...]]]
) -> None:
    """Write one row per clip, in order."""
    import pyarrow as pa

    with index_writer(file) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            writer.write_table(
                pa.Table.from_pylist(
                    [index_row(*row) for row in rows[start : start + ROW_GROUP]], index_schema()
                )
            )


def index_row(entry: ClipEntry, members: tuple[MemberEntry, ...]) -> dict[str, Any]:
    """Return a clip's row of the index."""
    facts = {
        name: getattr(entry, name)
        for name in ("key", "shard", "episode", "split", "latent_frames", "raw_frames")
    }
    return {**facts, "members": [{**vars(member)} for member in members]}


def fingerprint(
    rows: Iterable[tuple[ClipEntry, tuple[MemberEntry, ...]]], info: DatasetInfo
) -> str:
    """Return a sha256 over everything that training depends on.

    That is each clip's key, split and contents, the codec and the statistics, but not the file
    layout.
    """
    digest = hashlib.sha256()
    facts = [
        info.schema_version,
        info.codec,
        dict(info.codec_options),
        info.mean,
        info.std,
        info.fps,
        info.control_names,
    ]
    facts += [info.image_latents_every, info.null_text_crc32c]
    newer = [info.time_layout, info.control_std, info.controls_offset]
    facts += [newer] if newer != ["causal", (), 0] else []  # others keep the one that they had
    facts += [info.negative_text_crc32c] if info.negative_text else []
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for entry, members in rows:
        content = [[m.field, m.dtype, m.shape, m.crc32c] for m in members]
        digest.update(
            json.dumps(
                [entry.key, entry.split, entry.latent_frames, entry.raw_frames, content]
            ).encode()
        )
    return digest.hexdigest()
