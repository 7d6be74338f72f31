"""Open a data set and read exactly the requested byte ranges, verifying every latent frame.

Each frame has its own crc32c. Nothing is decoded but raw little-endian numbers whose dtype, shape
and position are in the index; no header from a shard is trusted, and nothing is ever unpickled. A
failure is one DataError naming shard, key and field. `shard_bytes` fetches the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data_shards.fields import Field, batch_fields, entries_of
from data_shards.schema import (
    INDEX,
    NEGATIVE_TEXT,
    NULL_TEXT,
    SPLITS,
    TIME_SHARDED,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    index_schema,
)
from data_shards.storage.files import (
    NPY_DESCRIPTIONS,
    all_finite,
    array_from_bytes,
    as_float32,
    crc32c,
    npy_header,
    parse_json,
    read_selection,
)
from data_shards.storage.index import (
    ClipIndex,
    ClipTable,
    check_finite,
    check_index_file,
    entry_name,
    is_arrows,
    where,
)
from data_shards.storage.npz import embedding_from_bytes
from data_shards.storage.remote import (
    RangeCache,
    RetryPolicy,
    is_transient,
    must_be_file,
    read_info,
    read_whole,
    with_retries,
)
from data_shards.storage.shard_bytes import ShardBytes, joined, lies_in
from data_shards.storage.zarr_store import Piece
from data_shards.time_layout import time_of

DEFAULT_POLICY = RetryPolicy()
JOINED_GAP = 64 * 1024  # members at most this far apart are one read


@dataclass(frozen=True)
class Clip:
    """Store a clip as read.

    latents [t, C, h, w] float32 as the codec made them (not normalised); fields: the other members
    as stored (bfloat16 as uint16), complete or, if read by row, those of the same frames. Fields
    that the data set lacks are absent.
    """

    entry: ClipEntry
    latents: NDArray[np.float32]
    fields: Mapping[str, NDArray[Any]]

    @property
    def c2w(self) -> NDArray[np.float64] | None:
        """Return [F,4,4], metres, OpenCV axes; None in a data set without poses."""
        return self.fields.get("c2w")

    @property
    def intrinsics(self) -> NDArray[np.float64] | None:
        """Return [F,4] fx, fy, cx, cy in pixels; None in a data set without poses."""
        return self.fields.get("intrinsics")


class ClipDataset:
    """Read clips of a data set opened by `open_dataset`. Thread-safe."""

    def __init__(
        self,
        path: str,
        filesystem: Any,
        root: str,
        info: DatasetInfo,
        index: ClipIndex,
        policy: RetryPolicy,
        cache: RangeCache | None,
    ) -> None:
        self.path, self.info = path, info
        self._policy, self._bytes = (
            policy,
            ShardBytes(filesystem, root, info.fingerprint, policy, cache),
        )
        self.fingerprint = (
            info.fingerprint
        )  # of the clips that are used: with a selection, another than the data set's
        self._fs, self._root, self._index = filesystem, root, index

    def clips(self, split: str) -> ClipTable:
        if split not in SPLITS:
            raise DataError(
                f"split: got {split!r}, expected one of {SPLITS} (data set {self.path})"
            )
        return self._index.clips(split)

    def keep(self, keys: Sequence[str]) -> None:
        """Drop all clips but these; `fingerprint` then covers the choice as well."""
        self._index.keep(keys)
        self.fingerprint = hashlib.sha256(
            json.dumps([self.fingerprint, sorted(keys)]).encode()
        ).hexdigest()

    def global_name(self, shard: str) -> str:
        """Return a shard's name, unique among all data sets at any path, for quarantine lists."""
        return f"{self.info.fingerprint[:12]}/{shard}"

    def find(self, key: str) -> ClipEntry:
        return self._index.find(key)

    def members(self, entry: ClipEntry) -> dict[str, MemberEntry]:
        """Return field -> member, checked against the allow-list and dataset.json."""
        return self._index.members(entry)

    def read(
        self,
        key: str | ClipEntry,
        frames: tuple[int, int] | None = None,
        replicated: bool = True,
        stored: bool = False,
        into: NDArray[np.uint8] | None = None,
    ) -> Clip:
        """Read a clip's latent frames [start, stop) and its fields.

        replicated: False leaves out the fields. stored: leave the latents as stored, for callers
        that convert them faster: float16, or bfloat16's bits as uint16. into: see `rows`.

        Raises:
            DataError: an unknown key, frames outside the clip, bad bytes, latents not finite.
        """
        entry = self.find(key) if isinstance(key, str) else key
        start, stop = frames or (0, entry.latent_frames)
        members = self.members(entry)
        present = [field for field in batch_fields() if replicated and field.member in members]
        fields = self.fields_of(entry, present, 0, (start, stop))
        latents = self.rows(entry, members[TIME_SHARDED], start, stop, into)
        check_finite(latents, entry, members[TIME_SHARDED], (start, stop))
        if not stored:
            latents = as_float32(latents, members[TIME_SHARDED].dtype)
        return Clip(entry, latents, fields)

    def fields_of(
        self, entry: ClipEntry, wanted: Sequence[Field], first: int, frames: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        """Return fields of a clip as stored, by name: whole, or of one that is read by row the
        entries of the latent frames [start, stop) of the cut that begins at latent `first`."""
        members, time = self.members(entry), time_of(self.info)
        whole = self.whole(entry, [members[field.member] for field in wanted if not field.by_row])
        found = {}
        for field in wanted:
            member = members[field.member]
            if not field.by_row:
                found[field.name] = whole[field.member]
                continue
            origin = first * (time.stride if field.rate == "raw" else 1)
            low, high = (origin + row for row in entries_of(field.rate, frames, time))
            found[field.name] = self.rows(entry, member, low, high)
            check_finite(found[field.name], entry, member, (low, high))
        return found

    def rows(
        self,
        entry: ClipEntry,
        member: MemberEntry,
        start: int,
        stop: int,
        into: NDArray[np.uint8] | None = None,
    ) -> NDArray[Any]:
        """Read rows [start, stop) of a member with a checksum per row, as stored.

        Only these bytes are read, and each row is verified; values are not checked. into: uint8 [n]
        to read into, if it is large enough; the result is then a view of it.
        """
        if not 0 <= start <= stop <= member.shape[0]:
            raise DataError(
                f"{entry_name(member)}s: got {start}:{stop}, expected a range inside"
                f" 0:{member.shape[0]} (key {entry.key})"
            )
        shape, size = (stop - start, *member.shape[1:]), member.row_bytes
        if start == stop:
            return array_from_bytes(b"", member.dtype, shape)
        kept = (
            into[: (stop - start) * size]
            if into is not None and len(into) >= (stop - start) * size
            else None
        )
        parts, row, at = [], start, 0
        for piece in lies_in(entry, member, start, stop):

            def wrong(data: NDArray[np.uint8], offset: int, row: int = row) -> str:
                """Return the error in its rows from byte `offset` of the piece on."""
                rows = enumerate(
                    (data[at : at + size] for at in range(0, len(data), size)), row + offset // size
                )
                bad = [
                    number for number, found in rows if crc32c(found) != member.row_crc32c[number]
                ]
                return (
                    f"checksum: got other bytes than were written in {entry_name(member)}s {bad}"
                    f" {where(entry, member)}"
                    if bad
                    else ""
                )

            place = None if kept is None else kept[at : at + piece.length]
            parts.append(self._bytes.rows(entry, member, piece, place, wrong))
            row, at = row + piece.length // size, at + piece.length
        data = parts[0] if len(parts) == 1 else np.concatenate(parts) if kept is None else kept
        return data.view(NPY_DESCRIPTIONS[member.dtype]).reshape(shape)

    def whole(self, entry: ClipEntry, members: Sequence[MemberEntry]) -> dict[str, NDArray[Any]]:
        """Read field -> array of replicated members, headers included, verified.

        Members side by side are read at once.
        """
        found: dict[str, NDArray[Any]] = {}
        for group in joined(members, -1 if entry.shard.endswith(".zarr") else JOINED_GAP):
            base, end = group[0].offset, group[-1].offset + group[-1].length
            piece = Piece(entry.shard, base, end - base)
            if entry.shard.endswith(".zarr"):
                piece = next(lies_in(entry, group[0], 0, group[0].shape[0]), piece)

            def wrong(
                data: NDArray[np.uint8], _: int, group: list[MemberEntry] = group, base: int = base
            ) -> str:
                for member in group:
                    part = data[member.offset - base :][: member.length]
                    header = member.data_offset - member.offset
                    if crc32c(part) != member.crc32c:
                        return f"checksum: got other bytes than were written {where(entry, member)}"
                    if header and part[:header].tobytes() != npy_header(member.dtype, member.shape):
                        return (
                            f"member: got an npy header that is not the index's {member.dtype}"
                            f" {member.shape} {where(entry, member)}"
                        )
                    if not all_finite(
                        array_from_bytes(part[header:], member.dtype, member.shape), member.dtype
                    ):
                        return f"values: got NaN or infinite ones {where(entry, member)}"
                return ""

            data = self._bytes.at_once(entry, group[0], piece, None, wrong)
            for member in group:
                payload = data[member.data_offset - base : member.offset + member.length - base]
                found[member.field] = array_from_bytes(payload, member.dtype, member.shape)
        return found

    def description(self, entry: ClipEntry) -> dict[str, Any]:
        """Return the clip's `json` member."""
        member = self.members(entry)["json"]
        data = self.whole(entry, [member])["json"].tobytes()
        return parse_json(data, "description", where(entry, member))

    def null_text(self) -> NDArray[np.float32] | None:
        """Return the verified embedding [L0, E] of the empty prompt; None without text (or
        DataError)."""
        named = self.info.null_text is not None
        return self._embedding(NULL_TEXT, self.info.null_text_crc32c) if named else None

    def negative_text(self) -> NDArray[np.float32] | None:
        """Return the verified embedding [L0, E] of the negative prompt; None where the set has none
        (or DataError)."""
        named = self.info.negative_text is not None
        return self._embedding(NEGATIVE_TEXT, self.info.negative_text_crc32c) if named else None

    def _embedding(self, file: str, crc: int) -> NDArray[np.float32]:
        place = f"{self._root}/{file}"
        try:
            data = with_retries(lambda: read_whole(self._fs, place), self._policy)
        except OSError as error:
            name = file.removesuffix(".npy").replace("_", " ")
            reason = (
                f"{name}: cannot read {self.path}/{file} ({error}). Fix: copy it again or encode"
                " again"
            )
            raise DataError(reason, is_transient(error)) from error
        return embedding_from_bytes(data, crc, self.info.text_width, f"{self.path}/{file}")

    def check_index(self) -> None:
        """Read the whole index and compare it with what dataset.json states of it; see
        `check_index_file`."""
        check_index_file(self._fs, f"{self._root}/{INDEX}", self.path, self.info, self._policy)


def open_dataset(
    path: str,
    selection: str | None = None,
    policy: RetryPolicy = DEFAULT_POLICY,
    cache: RangeCache | None = None,
    check: bool = True,
) -> ClipDataset:
    """Open a local folder or an fsspec URL (s3://…, gs://…, https://…).

    Args:
        selection: a file made by `data_shards.filter`; all other clips are dropped.
        policy: time-outs and how long to retry when an object store fails.
        cache: keeps the ranges read from shards on a local disk.
        check: compare the whole index with dataset.json; of many processes one is enough.

    Raises:
        DataError: no dataset.json there, one that this version cannot read, or an index that does
        not belong to it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, root, info = read_info(path, policy)
    try:
        must_be_file(filesystem, f"{root}/index.parquet")
        size = with_retries(lambda: filesystem.size(f"{root}/index.parquet"), policy)
        if size != info.index_bytes:
            raise DataError(
                f"index: got {size} bytes, expected {info.index_bytes} ({path}/index.parquet). Fix:"
                " copy it again"
            )
        if check:
            check_index_file(filesystem, f"{root}/index.parquet", path, info, policy)
        # Arrow opens a local file itself: thousands of row groups through a Python file cost a
        # second
        place = f"{root}/index.parquet"
        source = place if type(filesystem) is LocalFileSystem else filesystem.open(place, "rb")
        index = pq.ParquetFile(source, page_checksum_verification=True)
        if not index.schema_arrow.equals(index_schema()):
            raise OSError("its columns are not those of this version")
        dataset = ClipDataset(
            path, filesystem, root, info, ClipIndex(index, path, info, policy), policy, cache
        )
    except (OSError, pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        reason = (
            f"index: cannot read {path}/index.parquet ({' '.join(str(error).split())}). Fix: copy"
            " it again or encode again"
        )
        raise DataError(
            reason, isinstance(error, OSError) and not is_arrows(error) and is_transient(error)
        ) from error
    found = {split: len(dataset.clips(split)) for split in SPLITS}
    if found != dict(info.clips):
        raise DataError(
            f"index: got {found} clips, expected {dict(info.clips)} as dataset.json says ({path})."
            " Fix: encode again"
        )
    if selection is not None:
        select_clips([dataset], selection)
    return dataset


def select_clips(datasets: Sequence[ClipDataset], path: str) -> None:
    """Apply a selection file to the data set that it was made for.

    Raises:
        DataError: no such file, or made for none of these data sets.
    """
    fingerprint, kept = read_selection(path)
    chosen = [dataset for dataset in datasets if dataset.info.fingerprint == fingerprint]
    if not chosen:
        places = ", ".join(dataset.path for dataset in datasets)
        raise DataError(
            f"selection: got {path}, made for another data set, expected one for {places}. Fix:"
            " filter again"
        )
    for dataset in chosen:
        dataset.keep(kept)
