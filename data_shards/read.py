"""Open a data set and read exactly what is asked for: byte ranges, every latent frame checked by its own crc32c.

A local shard is read straight into the buffer that the caller gives, block by block, each checked while it is in the processor's cache;
other places go through fsspec, with retries and a cache of ranges. Nothing is decoded but raw little-endian numbers whose dtype, shape and
position the index gives; no header from a shard is trusted, and nothing is ever unpickled. A failure is one DataError naming shard, key
and field.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data_shards.files import NPY_DESCRIPTIONS, all_finite, array_from_bytes, as_float32, crc32c, npy_header, read_json
from data_shards.index import ClipIndex, ClipTable, where
from data_shards.remote import RangeCache, RetryPolicy, ShortRead, fetch, is_transient, storage_options, with_retries
from data_shards.schema import (
    NULL_TEXT,
    SPLITS,
    TIME_SHARDED,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    ShardError,
    index_schema,
    info_from_json,
)
from data_shards.zarr_store import read_bytes

DEFAULT_POLICY = RetryPolicy()
LARGE_READ = 64 * 2**20
BLOCK_BYTES = 512 * 1024  # of a local file read and checked at a time: fits the second-level cache
JOINED_GAP = 64 * 1024  # members at most this far apart are one read
REPLICATED = ("c2w.npy", "intrinsics.npy", "controls.npy", "text.npy", "text_mask.npy")
REPAIR = "copy the shard again, or encode again; `python -m data_shards.verify` lists all damage"


@dataclass(frozen=True)
class Clip:
    """latents [t, C, h, w] float32 as the codec made them (not normalised); the rest whole: c2w [F,4,4] and intrinsics [F,4] float64,
    controls [T,A] float32, text [L,E] as stored, text_mask [L] uint8. Members that the data set lacks are None."""

    entry: ClipEntry
    latents: NDArray[np.float32]
    c2w: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    controls: NDArray[np.float32] | None = None
    text: NDArray[np.float32] | None = None
    text_mask: NDArray[np.uint8] | None = None


class ClipDataset:
    """Made by `open_dataset`. Safe to use from several threads."""

    def __init__(
        self, path: str, filesystem: Any, root: str, info: DatasetInfo, index: ClipIndex, policy: RetryPolicy, cache: RangeCache | None
    ) -> None:
        self.path, self.info = path, info
        self._policy, self._cache = policy, cache
        self.fingerprint = info.fingerprint  # of the clips that are used: with a selection, another than the data set's
        self._fs, self._root, self._index = filesystem, root, index
        self._direct = type(filesystem) is LocalFileSystem and cache is None

    def clips(self, split: str) -> ClipTable:
        if split not in SPLITS:
            raise DataError(f"split: got {split!r}, expected one of {SPLITS} (data set {self.path})")
        return self._index.clips(split)

    def select(self, path: str) -> None:
        """Keep only the clips of a selection file; `fingerprint` then covers the choice too."""
        chosen = read_json(Path(path), "selection")
        if chosen.get("dataset_fingerprint") != self.info.fingerprint:
            raise DataError(f"selection: got {path}, made for another data set, expected one for {self.path}. Fix: filter again")
        self._index.keep(chosen["kept"])
        digest = hashlib.sha256(json.dumps([self.info.fingerprint, sorted(chosen["kept"])]).encode())
        self.fingerprint = digest.hexdigest()

    def global_name(self, shard: str) -> str:
        """The name of a shard among those of all data sets, whatever path they are reached by: for quarantine lists."""
        return f"{self.info.fingerprint[:12]}/{shard}"

    def find(self, key: str) -> ClipEntry:
        return self._index.find(key)

    def members(self, entry: ClipEntry) -> dict[str, MemberEntry]:
        """field -> where it lies, checked against the allow-list and dataset.json."""
        return self._index.members(entry)

    def read(
        self,
        key: str | ClipEntry,
        frames: tuple[int, int] | None = None,
        replicated: bool = True,
        stored: bool = False,
        into: NDArray[np.uint8] | None = None,
    ) -> Clip:
        """A clip's latent frames [start, stop) and, unless `replicated` is False, its other members whole.

        stored: leave the latents as they lie in the shard, for those who convert them faster: float16, or bfloat16's bits as uint16.
        into: see `rows`.

        Raises:
            DataError: an unknown key, frames outside the clip, missing or changed bytes, latents that are not finite.
        """
        entry = self.find(key) if isinstance(key, str) else key
        start, stop = frames or (0, entry.latent_frames)
        members = self.members(entry)
        whole = self.whole(entry, [members[field] for field in REPLICATED if replicated and field in members])
        latents = self.rows(entry, members[TIME_SHARDED], start, stop, into)
        check_finite(latents, entry, members[TIME_SHARDED], (start, stop))
        if not stored:
            latents = as_float32(latents, members[TIME_SHARDED].dtype)
        return Clip(entry, latents, **{field.removesuffix(".npy"): array for field, array in whole.items()})

    def rows(self, entry: ClipEntry, member: MemberEntry, start: int, stop: int, into: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Rows [start, stop) of a member with a checksum per row, as stored (bfloat16 as uint16): one read of just these bytes, each row
        verified. What the numbers are is not looked at.

        into: uint8 [n] to put them in, if it is large enough; the result is then a view of it.
        """
        if not 0 <= start <= stop <= member.shape[0]:
            raise DataError(f"latent frames: got {start}:{stop}, expected a range inside 0:{member.shape[0]} (key {entry.key})")
        shape, size = (stop - start, *member.shape[1:]), member.row_bytes
        if start == stop:
            return array_from_bytes(b"", member.dtype, shape)
        first, length = member.data_offset + start * size, (stop - start) * size

        def wrong_rows(data: NDArray[np.uint8], number: int) -> list[int]:
            """The damaged ones of the rows from `number` on."""
            rows = (data[at : at + size] for at in range(0, len(data), size))
            return [n for n, row in enumerate(rows, number) if crc32c(row) != member.row_crc32c[n]]

        def say(bad: list[int]) -> str:
            return f"checksum: got other bytes than were written in latent frames {bad} {where(entry, member)}" if bad else ""

        if self._direct and not entry.shard.endswith(".zarr"):
            data = self._stream(entry, member, first, length, into, lambda data, at: wrong_rows(data, start + at // size), say)
        else:
            read = self._range(entry, [member], (start, stop), (first, first + length), lambda data: say(wrong_rows(as_bytes(data), start)))
            data = as_bytes(read)
            if into is not None and len(into) >= length:
                into[:length] = data
                data = into[:length]
        return data.view(NPY_DESCRIPTIONS[member.dtype]).reshape(shape)

    def whole(self, entry: ClipEntry, members: Sequence[MemberEntry]) -> dict[str, NDArray[Any]]:
        """field -> array of replicated members, headers and all, verified. Those that lie side by side are one read."""
        zarr, found = entry.shard.endswith(".zarr"), dict[str, NDArray[Any]]()
        for group in joined(members, -1 if zarr else JOINED_GAP):
            base, end = group[0].offset, group[-1].offset + group[-1].length

            def wrong(data: bytes, group: list[MemberEntry] = group, base: int = base) -> str:
                for member in group:
                    part = memoryview(data)[member.offset - base :][: member.length]
                    header = member.data_offset - member.offset
                    if crc32c(part) != member.crc32c:
                        return f"checksum: got other bytes than were written {where(entry, member)}"
                    if header and part[:header] != npy_header(member.dtype, member.shape):
                        return f"member: got an npy header that is not the index's {member.dtype} {member.shape} {where(entry, member)}"
                    if not all_finite(array_from_bytes(part[header:], member.dtype, member.shape), member.dtype):
                        return f"values: got NaN or infinite ones {where(entry, member)}"
                return ""

            data = self._range(entry, group, (0, group[0].shape[0]), (base, end), wrong)
            for member in group:
                payload = memoryview(data)[member.data_offset - base : member.offset + member.length - base]
                found[member.field] = array_from_bytes(payload, member.dtype, member.shape)
        return found

    def description(self, entry: ClipEntry) -> dict[str, Any]:
        """The clip's `json` member."""
        return dict(json.loads(self.whole(entry, [self.members(entry)["json"]])["json"].tobytes()))

    def null_text(self) -> NDArray[np.float32] | None:
        """[L0, E], the embedding of the empty prompt, verified; None in a data set without text. Raises DataError for changed bytes."""
        if self.info.null_text is None:
            return None
        try:
            data = with_retries(lambda: self.file_bytes(NULL_TEXT), self._policy)
        except OSError as error:
            raise DataError(f"null text: cannot read {self.path}/{NULL_TEXT} ({error}). Fix: copy it again or encode again") from error
        if crc32c(data) != self.info.null_text_crc32c:
            raise DataError(f"null text: got other bytes than were written ({self.path}/{NULL_TEXT}). Fix: copy it again or encode again")
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.float32)

    def file_bytes(self, name: str) -> bytes:
        """A file beside the shards as it is, for `verify`."""
        return bytes(self._fs.cat_file(f"{self._root}/{name}"))

    def _stream(
        self,
        entry: ClipEntry,
        member: MemberEntry,
        first: int,
        length: int,
        into: NDArray[np.uint8] | None,
        wrong: Callable[[NDArray[np.uint8], int], list[int]],
        say: Callable[[list[int]], str],
    ) -> NDArray[np.uint8]:
        """Bytes from `first` on of a local shard. `wrong` gets each block and its position; `say` makes words of what it found."""
        step = max(1, BLOCK_BYTES // member.row_bytes) * member.row_bytes

        def attempt() -> tuple[NDArray[np.uint8], str]:
            bad: list[int] = []
            file = os.open(f"{self._root}/{entry.shard}", os.O_RDONLY)
            try:
                size = os.fstat(file).st_size
                if size < first + length:  # before a lying index makes us reserve its gigabytes
                    return np.empty(0, np.uint8), f"shard: got {size} bytes, expected at least {first + length} {where(entry, member)}"
                data = into[:length] if into is not None and len(into) >= length else np.empty(length, np.uint8)
                read_ahead(file, first, length)
                for at in range(0, length, step):
                    block = data[at : at + step]
                    read_fully(file, block, first + at)
                    bad += wrong(block, at)
                return data, say(bad)
            finally:
                os.close(file)

        try:
            data, problem = with_retries(attempt, self._policy)
        except OSError as error:
            problem = f"shard: cannot read it ({type(error).__name__}: {error}) {where(entry, member)}"
        if problem:
            raise ShardError(f"{problem}. Fix: {REPAIR}", entry.shard)
        return data

    def _range(
        self, entry: ClipEntry, members: Sequence[MemberEntry], rows: tuple[int, int], span: tuple[int, int], wrong: Callable[[bytes], str]
    ) -> bytes:
        """Rows of a member, which in a tar are the bytes `span`, or that span over several members. `wrong` says what is wrong."""
        if entry.shard.endswith(".zarr"):
            data = read_bytes(self.path, entry, members[0], *rows)
            problem = wrong(data)
        else:
            data, problem = self._span(entry, members[0], span, wrong)
        if problem:
            raise ShardError(f"{problem}. Fix: {REPAIR}", entry.shard)
        return data

    def _span(self, entry: ClipEntry, member: MemberEntry, span: tuple[int, int], wrong: Callable[[bytes], str]) -> tuple[bytes, str]:
        """(bytes, what is wrong with them); a cached range gets a second chance."""
        path, length = f"{self._root}/{entry.shard}", span[1] - span[0]

        def fill() -> bytes:
            # an index that lies about sizes must not make us reserve its gigabytes
            if length > LARGE_READ and span[1] > self._fs.size(path):
                raise ShortRead(f"the shard ends before byte {span[1]}")
            return fetch(self._fs, path, *span, self._policy)

        def check(data: bytes) -> str:
            if len(data) != length:
                return f"shard: got {len(data)} bytes, expected {length} from byte {span[0]} {where(entry, member)}"
            return wrong(data)

        try:
            if self._cache is None:
                data = fill()
                return data, check(data)
            identity = f"{self.info.fingerprint} {path} {span}"
            data = self._cache.get(identity, length, fill)
            if check(data):
                self._cache.drop(identity)
                data = self._cache.get(identity, length, fill)
            return data, check(data)
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)) and not is_transient(error):
                raise
            return b"", f"shard: cannot read it ({type(error).__name__}: {error}) {where(entry, member)}"


def check_finite(array: NDArray[Any], entry: ClipEntry, member: MemberEntry, rows: tuple[int, int]) -> None:
    """Raises ShardError if stored latents hold anything but numbers: their bytes are as written, but their writer did not look."""
    if not all_finite(array, member.dtype):
        place = where(entry, member)
        raise ShardError(f"latents: got NaN or infinite values {place}, frames {rows[0]}:{rows[1]}. Fix: encode again", entry.shard)


def as_bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def read_ahead(file: int, offset: int, length: int) -> None:
    """Ask for a whole range at once unless it is in memory: storage then brings the rest of it while the first rows are checked."""
    try:
        os.preadv(file, [bytearray(1)], offset + length - 1, os.RWF_NOWAIT)  # in memory, or an error: it does not wait
    except OSError:
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)


def read_fully(file: int, block: NDArray[np.uint8], offset: int) -> None:
    """Fill the block from a file descriptor: one system call may bring less than was asked for."""
    done = 0
    while done < len(block):
        count = os.preadv(file, [block[done:]], offset + done)  # type: ignore[list-item]
        if count == 0:
            raise ShortRead(f"the shard ends at byte {offset + done}")
        done += count


def joined(members: Sequence[MemberEntry], gap: int) -> list[list[MemberEntry]]:
    """Members in groups that are read at once: in the order of the file, at most `gap` bytes between them."""
    groups: list[list[MemberEntry]] = []
    for member in sorted(members, key=lambda member: member.offset):
        if groups and gap >= 0 and member.offset - (groups[-1][-1].offset + groups[-1][-1].length) <= gap:
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


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
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs tries five times by itself, which our budget would not see
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
        # Arrow opens a local file itself: thousands of row groups through a Python file cost a second
        place = f"{root}/index.parquet"
        source = place if type(filesystem) is LocalFileSystem else filesystem.open(place, "rb")
        index = pq.ParquetFile(source, page_checksum_verification=True)
        if not index.schema_arrow.equals(index_schema()):
            raise OSError("its columns are not those of this version")
        dataset = ClipDataset(path, filesystem, root, info, ClipIndex(index, path, info, policy), policy, cache)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"index: cannot read {path}/index.parquet ({error}). Fix: copy it again or encode again") from error
    found = {split: len(dataset.clips(split)) for split in SPLITS}
    if found != dict(info.clips):
        raise DataError(f"index: got {found} clips, expected {dict(info.clips)} as dataset.json says ({path}). Fix: encode again")
    if selection is not None:
        dataset.select(selection)
    return dataset
