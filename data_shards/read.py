"""Open a data set and read exactly what is asked for: byte ranges through fsspec, every latent frame checked by its own crc32c.

Nothing is decoded but raw little-endian numbers whose dtype, shape and position the index gives; no header from a shard is trusted, and
nothing is ever unpickled. A failure is one DataError naming shard, key and field.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_shards.files import all_finite, array_from_bytes, as_float32, crc32c, npy_header, read_json
from data_shards.remote import RangeCache, RetryPolicy, ShortRead, fetch, is_transient, storage_options, with_retries
from data_shards.schema import (
    FIELDS,
    ITEM_BYTES,
    MAX_FREE_BYTES,
    READ_BY_ROW,
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
    expected_shape,
    index_schema,
    info_from_json,
)
from data_shards.zarr_store import read_bytes

DEFAULT_POLICY = RetryPolicy()
LARGE_READ = 64 * 2**20
MAX_HEADER_BYTES = 1024  # of an npy member; ours have 128


@dataclass(frozen=True)
class Clip:
    """latents [t, C, h, w] float32 as the codec made them (not normalised); the rest whole: c2w [F,4,4] and intrinsics [F,4] float64,
    controls [T,A] float32. Members that the data set lacks are None."""

    entry: ClipEntry
    latents: NDArray[np.float32]
    c2w: NDArray[np.float64] | None
    intrinsics: NDArray[np.float64] | None
    controls: NDArray[np.float32] | None


class ClipTable(Sequence[ClipEntry]):
    """The clips of one split, made one by one from columns: a million clips cost columns, not a million objects."""

    def __init__(self, columns: Any, rows: NDArray[np.int64]) -> None:
        self._columns, self._rows = columns, rows

    @property
    def latent_frames(self) -> NDArray[np.int64]:
        """[clips] T of each clip."""
        return self._columns["latent_frames"].to_numpy()[self._rows].astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        row = int(self._rows[index])
        return entry_at(self._columns, row)

    def __iter__(self) -> Iterator[ClipEntry]:
        return (self[i] for i in range(len(self)))


def entry_at(columns: Any, row: int) -> ClipEntry:
    key, shard, episode, split, latent_frames, raw_frames = (columns[name][row].as_py() for name in columns.column_names)
    return ClipEntry(key, row, shard, episode, split, latent_frames, raw_frames)


class ClipDataset:
    """Made by `open_dataset`. Safe to use from several threads."""

    def __init__(
        self, path: str, filesystem: Any, root: str, info: DatasetInfo, index: Any, policy: RetryPolicy, cache: RangeCache | None
    ) -> None:
        self.path, self.info = path, info
        self._policy, self._cache = policy, cache
        self.fingerprint = info.fingerprint  # of the clips that are used: with a selection, another than the data set's
        self._fs, self._root, self._index = filesystem, root, index
        self._columns = index.read(columns=["key", "shard", "episode", "split", "latent_frames", "raw_frames"]).combine_chunks()
        # compared inside Arrow: a million Python strings would cost a second and 60 MB
        self._rows = {split: np.flatnonzero(pc.equal(self._columns["split"], split).to_numpy()) for split in SPLITS}
        group_rows = [index.metadata.row_group(i).num_rows for i in range(index.metadata.num_row_groups)]
        self._group_ends = np.cumsum(group_rows).tolist()
        # per instance, so two data sets never share entries; a row group is some hundred kilobytes
        self._group = lru_cache(maxsize=64)(self._read_group)

    def clips(self, split: str) -> ClipTable:
        if split not in SPLITS:
            raise DataError(f"split: got {split!r}, expected one of {SPLITS} (data set {self.path})")
        return ClipTable(self._columns, self._rows[split])

    def select(self, path: str) -> None:
        """Keep only the clips of a selection file; `fingerprint` then covers the choice too."""
        chosen = read_json(Path(path), "selection")
        if chosen.get("dataset_fingerprint") != self.info.fingerprint:
            raise DataError(f"selection: got {path}, made for another data set, expected one for {self.path}. Fix: filter again")
        kept = np.isin(self._columns["key"].to_numpy(), np.array(chosen["kept"], dtype=object))
        self._rows = {split: rows[kept[rows]] for split, rows in self._rows.items()}
        digest = hashlib.sha256(json.dumps([self.info.fingerprint, sorted(chosen["kept"])]).encode())
        self.fingerprint = digest.hexdigest()

    def find(self, key: str) -> ClipEntry:
        row = pc.index(self._columns["key"], key).as_py()
        if row < 0:
            raise DataError(f"clip: got key {key!r}, expected one of the {len(self._columns)} keys of {self.path}")
        return entry_at(self._columns, row)

    def members(self, entry: ClipEntry) -> dict[str, MemberEntry]:
        """field -> where it lies, checked against the allow-list and dataset.json."""
        group = bisect.bisect_right(self._group_ends, entry.row)
        start = self._group_ends[group - 1] if group else 0
        found: dict[str, MemberEntry] = {}
        for raw in self._group(group)[entry.row - start].as_py():
            member = MemberEntry(**{**raw, "shape": tuple(raw["shape"]), "row_crc32c": tuple(raw["row_crc32c"])})
            check_member(member, entry, self.info, duplicate=member.field in found)
            found[member.field] = member
        for field in sorted({TIME_SHARDED, *expected_fields(self.info, entry.raw_frames)} - set(found)):
            raise DataError(f"index: got no member (shard {entry.shard}, key {entry.key}, field {field}). Fix: encode again")
        return found

    def read(self, key: str | ClipEntry, frames: tuple[int, int] | None = None, replicated: bool = True, stored: bool = False) -> Clip:
        """A clip's latent frames [start, stop) and, unless `replicated` is False, its other members whole.

        `stored` leaves the latents as they lie in the shard, for those who convert them faster: float16, or bfloat16's bits as uint16.

        Raises:
            DataError: an unknown key, frames outside the clip, missing or changed bytes.
        """
        entry = self.find(key) if isinstance(key, str) else key
        start, stop = frames or (0, entry.latent_frames)
        members = self.members(entry)
        c2w, intrinsics, controls = (
            self.whole(entry, members[field]) if replicated and field in members else None
            for field in ("c2w.npy", "intrinsics.npy", "controls.npy")
        )
        latents = self.rows(entry, members[TIME_SHARDED], start, stop)
        if not stored:
            latents = as_float32(latents, members[TIME_SHARDED].dtype)
        return Clip(entry, latents, c2w, intrinsics, controls)

    def rows(self, entry: ClipEntry, member: MemberEntry, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of a time-sharded member as stored (bfloat16 as uint16): one read of just these bytes, each row verified."""
        if not 0 <= start <= stop <= member.shape[0]:
            raise DataError(f"latent frames: got {start}:{stop}, expected a range inside 0:{member.shape[0]} (key {entry.key})")
        shape = (stop - start, *member.shape[1:])
        if start == stop:
            return array_from_bytes(b"", member.dtype, shape)
        size = member.row_bytes

        def wrong(data: bytes) -> str:
            rows = (memoryview(data)[i * size : (i + 1) * size] for i in range(stop - start))
            bad = [start + i for i, row in enumerate(rows) if crc32c(row) != member.row_crc32c[start + i]]
            return f"checksum: got other bytes than were written in latent frames {bad}" if bad else ""

        data = self._range(entry, member, (start, stop), (member.data_offset + start * size, member.data_offset + stop * size), wrong)
        array = array_from_bytes(data, member.dtype, shape)
        if not all_finite(array, member.dtype):
            raise ShardError(
                f"latents: got NaN or infinite values {where(entry, member)}, frames {start}:{stop}. Fix: encode again", entry.shard
            )
        return array

    def whole(self, entry: ClipEntry, member: MemberEntry) -> NDArray[Any]:
        """A replicated member, header and all, verified."""
        header = member.data_offset - member.offset

        def wrong(data: bytes) -> str:
            if crc32c(data) != member.crc32c:
                return "checksum: got other bytes than were written"
            if header and data[:header] != npy_header(member.dtype, member.shape):
                return f"member: got an npy header that is not the index's {member.dtype} {member.shape}"
            return ""

        data = self._range(entry, member, (0, member.shape[0]), (member.offset, member.offset + member.length), wrong)
        return array_from_bytes(data[header:], member.dtype, member.shape)

    def description(self, entry: ClipEntry) -> dict[str, Any]:
        """The clip's `json` member."""
        return dict(json.loads(self.whole(entry, self.members(entry)["json"]).tobytes()))

    def index_bytes(self) -> bytes:
        """The index file as it is, for `verify`."""
        return bytes(self._fs.cat_file(f"{self._root}/index.parquet"))

    def _range(
        self, entry: ClipEntry, member: MemberEntry, rows: tuple[int, int], span: tuple[int, int], wrong: Callable[[bytes], str]
    ) -> bytes:
        """Rows of a member, which in a tar are the bytes `span`. `wrong` says what is wrong; a cached range gets a second chance."""
        if entry.shard.endswith(".zarr"):
            data = read_bytes(self.path, entry, member, *rows)
            problem = wrong(data)
        else:
            data, problem = self._span(entry, member, span, wrong)
        if problem:
            raise ShardError(f"{problem} {where(entry, member)}. Fix: {REPAIR}", entry.shard)
        return data

    def _span(self, entry: ClipEntry, member: MemberEntry, span: tuple[int, int], wrong: Callable[[bytes], str]) -> tuple[bytes, str]:
        path, length = f"{self._root}/{entry.shard}", span[1] - span[0]

        def fill() -> bytes:
            # an index that lies about sizes must not make us reserve its gigabytes
            if length > LARGE_READ and span[1] > self._fs.size(path):
                raise ShortRead(f"the shard ends before byte {span[1]}")
            return fetch(self._fs, path, *span, self._policy)

        try:
            if self._cache is None:
                data = fill()
                return data, wrong(data) if len(data) == length else f"shard: got {len(data)} bytes, expected {length} from byte {span[0]}"
            identity = f"{self.info.fingerprint} {path} {span}"
            data = self._cache.get(identity, length, fill)
            if len(data) != length or wrong(data):
                self._cache.drop(identity)
                data = self._cache.get(identity, length, fill)
            return data, wrong(data) if len(data) == length else f"shard: got {len(data)} bytes, expected {length} from byte {span[0]}"
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)) and not is_transient(error):
                raise
            return b"", f"shard: cannot read it ({type(error).__name__}: {error})"

    def _read_group(self, group: int) -> Any:
        try:
            return with_retries(lambda: self._index.read_row_group(group, columns=["members"])["members"], self._policy)
        except OSError as error:
            raise DataError(f"index: cannot read row group {group} of {self.path}/index.parquet ({error}). Fix: encode again") from error


REPAIR = "copy the shard again, or encode again; `python -m data_shards.verify` lists all damage"


def where(entry: ClipEntry, member: MemberEntry) -> str:
    return f"(shard {entry.shard}, key {entry.key}, field {member.field})"


def check_member(member: MemberEntry, entry: ClipEntry, info: DatasetInfo, duplicate: bool) -> None:
    """An index may be damaged or hostile too: names and dtypes must be on the lists, shapes and sizes agree."""
    problem = ""
    if not SHARD_PATTERN.fullmatch(entry.shard):
        problem = f"got shard name {entry.shard!r}, expected shards/NNNNNN.tar or .zarr"
    elif duplicate:
        problem = "got this field twice"
    elif member.field not in FIELDS or member.dtype not in FIELDS[member.field][1]:
        problem = f"got field {member.field!r} of dtype {member.dtype!r}, expected one of {sorted(FIELDS)}"
    else:
        expected = expected_shape(info, member.field, entry)
        agrees = len(member.shape) == len(expected) and all(e in (None, n) and n >= 0 for n, e in zip(member.shape, expected))
        count = int(np.prod(member.shape, dtype=np.float64)) * ITEM_BYTES[member.dtype]
        header = member.data_offset - member.offset
        if not agrees:
            problem = f"got shape {member.shape}, expected {expected}"
        elif None in expected and count > MAX_FREE_BYTES:
            problem = f"got {count} bytes, expected at most {MAX_FREE_BYTES}"
        elif (header and entry.shard.endswith(".zarr")) or (not header and member.field != "json" and entry.shard.endswith(".tar")):
            problem = f"got {header} bytes of header, expected none in Zarr and an npy header in a tar"
        elif member.offset < 0 or not 0 <= header <= MAX_HEADER_BYTES or member.length != header + count:
            problem = f"got {member.length} bytes at {member.offset} with data at {member.data_offset}, expected {count} data bytes"
        elif member.field in READ_BY_ROW and len(member.row_crc32c) != member.shape[0]:
            problem = f"got {len(member.row_crc32c)} frame checksums, expected {member.shape[0]}"
    if problem:
        raise DataError(f"index: {problem} {where(entry, member)}. Fix: encode again")
    check_key(entry.key)


def open_dataset(
    path: str, selection: str | None = None, policy: RetryPolicy = DEFAULT_POLICY, cache: RangeCache | None = None
) -> ClipDataset:
    """Open a local folder or an fsspec URL (s3://…, gs://…, https://…).

    Args:
        selection: a file made by `data_shards.filter`; only the clips it keeps are seen.
        policy: time-outs and how long to try again when an object store fails.
        cache: keeps the ranges read from shards on a local disk.

    Raises:
        DataError: no dataset.json there, one that this version cannot read, or an index that does not belong to it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        filesystem, root = fsspec.core.url_to_fs(path, **storage_options(path, policy))
    except (ValueError, ImportError) as error:
        raise DataError(f"data.path: got {path!r}, expected a folder or a URL that fsspec opens ({error})") from error
    root = root.rstrip("/")
    try:
        text = with_retries(lambda: bytes(filesystem.cat_file(f"{root}/dataset.json")), policy).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"data.path: got {path}, which holds no dataset.json, expected a finished data set. "
            f"Fix: python -m data_shards.encode source=<recording> out={path}"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.path: cannot read {path}/dataset.json ({type(error).__name__}: {error}). Fix: see access rights and the network"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.json: got bytes that are not text ({path}/dataset.json). Fix: encode again") from error
    info = info_from_json(text, f"{path}/dataset.json")
    try:
        size = with_retries(lambda: filesystem.size(f"{root}/index.parquet"), policy)
        if size != info.index_bytes:
            raise DataError(f"index: got {size} bytes, expected {info.index_bytes} ({path}/index.parquet). Fix: copy it again")
        index = pq.ParquetFile(filesystem.open(f"{root}/index.parquet", "rb"), page_checksum_verification=True)
        if not index.schema_arrow.equals(index_schema()):
            raise OSError("its columns are not those of this version")
        dataset = ClipDataset(path, filesystem, root, info, index, policy, cache)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"index: cannot read {path}/index.parquet ({error}). Fix: copy it again or encode again") from error
    found = {split: len(dataset.clips(split)) for split in SPLITS}
    if found != dict(info.clips):
        raise DataError(f"index: got {found} clips, expected {dict(info.clips)} as dataset.json says ({path}). Fix: encode again")
    if selection is not None:
        dataset.select(selection)
    return dataset
