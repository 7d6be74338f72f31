"""Read index.parquet lazily: two columns when the data set is opened, a clip's row when drawn.

A clip's row is read with its row group, which is kept for a while. So a million clips cost
megabytes and tenths of a second, and a draw costs one small row group.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.fields import expected_shape, field_of, known_members
from data_shards.schema import (
    ITEM_BYTES,
    MAX_FREE_BYTES,
    MAX_MEMBER_BYTES,
    SHARD_PATTERN,
    SPLITS,
    TIME_SHARDED,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    ShardError,
    check_key,
    expected_fields,
    shown,
)
from data_shards.storage.files import all_finite, error_text
from data_shards.storage.remote import RetryPolicy, is_transient, open_file, with_retries
from data_shards.time_layout import time_of

MAX_HEADER_BYTES = 1024  # of an npy member; ours have 128
KEPT_GROUPS = 64  # some hundred kilobytes each
READ_BYTES = 4 * 2**20
MAX_GROUP_BYTES = 2**30  # of a row group: ours have 256 clips


def check_index_file(
    filesystem: Any, file: str, path: str, info: DatasetInfo, policy: RetryPolicy
) -> None:
    """Raise DataError unless the index at `file` has the bytes that dataset.json states.

    What is read later, a clip at a time, then has the checksums of the set's fingerprint.
    """

    def attempt() -> str:
        digest = hashlib.sha256()
        with open_file(filesystem, file) as stream:
            while data := stream.read(READ_BYTES):
                digest.update(data)
        return digest.hexdigest()

    try:
        found = with_retries(attempt, policy)
    except OSError as error:
        raise DataError(
            f"index: cannot read {path}/index.parquet ({error_text(error)}). Fix: copy it again or"
            " encode again",
            is_transient(error),
        ) from error
    if found != info.index_sha256:
        raise DataError(
            "index: got other bytes than dataset.json states; nothing it says about the shards can"
            f" be trusted ({path}/index.parquet). Fix: copy the data set again, or encode again"
        )


class ClipIndex:
    """Read the rows of index.parquet (a pyarrow ParquetFile). Thread-safe."""

    def __init__(self, file: Any, path: str, info: DatasetInfo, policy: RetryPolicy) -> None:
        self._file, self._path, self._info, self._policy = file, path, info, policy
        self._lock = threading.Lock()  # the file's position is shared
        check_size(file.metadata, path, info)
        columns = self._read(
            lambda: checked(file.read(columns=["split", "latent_frames"])), "its columns"
        )
        if any(column.null_count for column in columns.columns):
            raise DataError(f"index: got rows without split or length ({path}). Fix: encode again")
        # numbers instead of a million Python strings
        encoded = columns["split"].combine_chunks().dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), integers(encoded.indices, np.int32)
        self._rows = {
            split: np.flatnonzero(codes == (names.index(split) if split in names else -1))
            for split in SPLITS
        }
        self.latent_frames: NDArray[np.int32] = integers(
            columns["latent_frames"].combine_chunks(), np.int32
        )
        self._group_ends = np.cumsum(
            [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ).tolist()
        self._group = lru_cache(maxsize=KEPT_GROUPS)(
            self._read_group
        )  # per instance, so two data sets never share entries

    def clips(self, split: str) -> ClipTable:
        return ClipTable(self, self._rows[split])

    def keep(self, keys: Sequence[str]) -> None:
        """Drop all clips but these."""
        kept = positions(self._keys, keys)
        self._rows = {
            split: np.intersect1d(rows, kept, assume_unique=True)
            for split, rows in self._rows.items()
        }

    def find(self, key: str) -> ClipEntry:
        import pyarrow.compute as pc

        row = pc.index(self._keys, key).as_py()
        if row < 0:
            raise DataError(
                f"clip: got key {key!r}, expected one of the {len(self.latent_frames)} keys of"
                f" {self._path}"
            )
        return self.entry(row)

    def in_shards(self, shards: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of the clips in these shards."""
        names = self._read(lambda: self._file.read(columns=["shard"]), "its shard names")["shard"]
        return positions(names, shards)

    def entry(self, row: int) -> ClipEntry:
        group, place = self._place(row)
        key, shard, episode, split, latent_frames, raw_frames = (
            column[place].as_py() for column in group.columns[:-1]
        )
        entry = ClipEntry(key, row, shard, episode, split, latent_frames, raw_frames)
        check_entry(entry, self._info)
        return entry

    def members(self, entry: ClipEntry) -> dict[str, MemberEntry]:
        """Return field -> member, checked against the allow-list and dataset.json."""
        group, place = self._place(entry.row)
        found: dict[str, MemberEntry] = {}
        for raw in group["members"][place].as_py() or ():
            if raw is None or None in raw.values() or None in raw["shape"] + raw["row_crc32c"]:
                raise DataError(
                    f"index: got a member without all its facts (shard {entry.shard}, key"
                    f" {entry.key}). Fix: encode again"
                )
            member = MemberEntry(
                **{**raw, "shape": tuple(raw["shape"]), "row_crc32c": tuple(raw["row_crc32c"])}
            )
            check_member(member, entry, self._info, duplicate=member.field in found)
            found[member.field] = member
        for field in sorted(
            {TIME_SHARDED, *expected_fields(self._info, entry.raw_frames)} - set(found)
        ):
            raise DataError(
                f"index: got no member (shard {entry.shard}, key {entry.key}, field {field}). Fix:"
                " encode again"
            )
        return found

    @cached_property
    def _keys(self) -> Any:
        return self._read(lambda: self._file.read(columns=["key"]), "its keys")[
            "key"
        ].combine_chunks()

    def _place(self, row: int) -> tuple[Any, int]:
        """Return (row group, position in it) of a row."""
        number = bisect.bisect_right(self._group_ends, row)
        return self._group(number), row - (self._group_ends[number - 1] if number else 0)

    def _read_group(self, group: int) -> Any:
        return self._read(
            lambda: checked(self._file.read_row_group(group, use_threads=False).combine_chunks()),
            f"row group {group}",
        )

    def _read(self, what: Callable[[], Any], name: str) -> Any:
        import pyarrow as pa

        def attempt() -> Any:
            try:
                return what()
            except (pa.ArrowException, ValueError, MemoryError) as error:
                raise self._damage(name, error) from error
            except OSError as error:
                if is_arrows(error):
                    raise self._damage(name, error) from error
                raise

        try:
            with self._lock:
                return with_retries(attempt, self._policy)
        except OSError as error:
            raise self._damage(name, error) from error

    def _damage(self, name: str, error: Exception) -> DataError:
        what = " ".join(str(error).split())  # Arrow's has lines
        reason = (
            f"index: cannot read {name} of {self._path}/index.parquet ({what}). Fix: copy it again,"
            " or encode again"
        )
        store = isinstance(error, OSError) and not is_arrows(error)
        return DataError(reason, store and is_transient(error))


class ClipTable(Sequence[ClipEntry]):
    """List the clips of one split, each looked up on access."""

    def __init__(self, index: ClipIndex, rows: NDArray[np.int64]) -> None:
        self._index, self._rows = index, rows

    @property
    def latent_frames(self) -> NDArray[np.int64]:
        """Return T of each clip, [clips]."""
        return self._index.latent_frames[self._rows].astype(np.int64)

    def in_shards(self, shards: Sequence[str]) -> int:
        """Return the number of clips in these shards."""
        return len(np.intersect1d(self._rows, self._index.in_shards(shards), assume_unique=True))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._index.entry(int(self._rows[index]))

    def __iter__(self) -> Iterator[ClipEntry]:
        return (self[i] for i in range(len(self)))


def checked(table: Any) -> Any:
    """Return an Arrow table whose texts are text and whose lists end inside it; raise an
    ArrowException otherwise, as damaged pages need not say so."""
    table.validate(full=True)
    return table


def integers(array: Any, dtype: Any) -> NDArray[Any]:
    """Return an Arrow array of integers without nulls as a numpy view.

    Arrow's own conversion imports pandas, which takes half a second.
    """
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def positions(column: Any, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the ascending positions at which a column of Arrow holds one of `names`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    mask = pc.is_in(column, value_set=pa.array(list(names), pa.string()))
    return integers(pc.indices_nonzero(mask), np.uint64).astype(np.int64)


def is_arrows(error: OSError) -> bool:
    """Return True if an error is Arrow's own: the bytes are wrong, and trying later cannot help."""
    return error.errno is None and type(error) is OSError


def where(entry: ClipEntry, member: MemberEntry) -> str:
    """Return the place of a member for an error message, on one line whatever the index says."""
    shard, key, field = (
        text if text.isprintable() else shown(text)
        for text in (entry.shard, entry.key, member.field)
    )
    return f"(shard {shard}, key {key}, field {field})"


def check_size(metadata: Any, path: str, info: DatasetInfo) -> None:
    """Raise DataError for an index of more or larger rows than dataset.json speaks of, before they
    are read."""
    clips = sum(info.clips.values())
    if metadata.num_rows != clips:
        raise DataError(
            f"index: got {metadata.num_rows} rows, expected {dict(info.clips)} clips as"
            f" dataset.json says ({path}). Fix: encode again"
        )
    for number in range(metadata.num_row_groups):
        if (size := metadata.row_group(number).total_byte_size) > MAX_GROUP_BYTES:
            raise DataError(
                f"index: got {size} bytes in row group {number}, expected at most {MAX_GROUP_BYTES}"
                f" ({path}). Fix: encode again"
            )


def check_entry(entry: ClipEntry, info: DatasetInfo) -> None:
    """Raise DataError for a row of the index that describes no clip."""
    row = f"row {entry.row}"
    if not all(isinstance(text, str) for text in (entry.key, entry.shard, entry.episode)):
        raise DataError(f"index: got {row} without key, shard or episode. Fix: encode again")
    if not SHARD_PATTERN.fullmatch(entry.shard):
        raise DataError(
            f"index: got shard name {shown(entry.shard)}, expected shards/NNNNNN.tar or .zarr"
            f" ({row}). Fix: encode again"
        )
    check_key(entry.key)
    lengths = (entry.latent_frames, entry.raw_frames)
    whole = all(isinstance(length, int) and length > 0 for length in lengths)
    if not whole or not entry.episode.isprintable():
        raise DataError(
            f"index: got {lengths} frames and episode {shown(entry.episode)}, expected lengths and"
            f" a name (key {entry.key}). Fix: encode again"
        )
    time = time_of(info)
    if not time.fits(entry.raw_frames) or entry.latent_frames != time.latents(entry.raw_frames):
        raise DataError(
            f"index: got {entry.latent_frames} latents of {entry.raw_frames} frames, expected one"
            f" for every {info.temporal_stride}, the first of {time.first} (key {entry.key}). Fix:"
            " encode again"
        )


def check_finite(
    array: NDArray[Any], entry: ClipEntry, member: MemberEntry, rows: tuple[int, int]
) -> None:
    """Raise ShardError if stored rows hold anything but numbers: their bytes are as written, but
    their writer did not look."""
    if not all_finite(array, member.dtype):
        place = where(entry, member)
        raise ShardError(
            f"values: got NaN or infinite values {place}, {entry_name(member)}s"
            f" {rows[0]}:{rows[1]}. Fix: encode again",
            entry.shard,
        )


def entry_name(member: MemberEntry) -> str:
    """Return what messages call a row of this member."""
    field = field_of(member.field)
    assert field is not None, "the index has been checked"
    return field.entry_name


def check_member(member: MemberEntry, entry: ClipEntry, info: DatasetInfo, duplicate: bool) -> None:
    """Raise DataError for a member that is not allowed, as an index may be damaged or hostile.

    Names and dtypes must be on the lists, shapes and sizes must agree.
    """
    problem, fix, field = "", "encode again", field_of(member.field)
    if duplicate:
        problem = "got this field twice"
    elif field is None or member.dtype not in field.dtypes:
        problem = (
            f"got field {member.field!r} of dtype {member.dtype!r}, expected one of"
            f" {known_members()}"
        )
        fix += ", or install the package that adds this field (entry point data_shards.fields)"
    else:
        expected = expected_shape(field, info, entry)
        agrees = len(member.shape) == len(expected) and all(
            e in (None, n) and n >= 0 for n, e in zip(member.shape, expected)
        )
        count = int(np.prod(member.shape, dtype=np.float64)) * ITEM_BYTES[member.dtype]
        header = member.data_offset - member.offset
        if not agrees:
            problem = f"got shape {member.shape}, expected {expected}"
        elif None in expected and count > MAX_FREE_BYTES:
            problem = f"got {count} bytes, expected at most {MAX_FREE_BYTES}"
        elif (header and entry.shard.endswith(".zarr")) or (
            not header and member.field != "json" and entry.shard.endswith(".tar")
        ):
            problem = (
                f"got {header} bytes of header, expected none in Zarr and an npy header in a tar"
            )
        elif entry.shard.endswith(".tar") and member.length > MAX_MEMBER_BYTES:
            problem = f"got {member.length} bytes, expected at most {MAX_MEMBER_BYTES} in a tar"
        elif (
            member.offset < 0
            or not 0 <= header <= MAX_HEADER_BYTES
            or member.length != header + count
        ):
            problem = (
                f"got {member.length} bytes at {member.offset} with data at {member.data_offset},"
                f" expected {count} data bytes"
            )
        elif field.by_row and len(member.row_crc32c) != member.shape[0]:
            problem = f"got {len(member.row_crc32c)} frame checksums, expected {member.shape[0]}"
    if problem:
        raise DataError(f"index: {problem} {where(entry, member)}. Fix: {fix}")
