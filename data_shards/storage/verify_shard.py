"""Check every byte of one shard against its index rows.

A shard is fully determined by its index rows: canonical tar headers, npy headers, payloads with
known checksums, zero padding, two zero blocks, end; or the files of a Zarr group, in the same way.
So each byte is either right or reported, with shard, key and field; a damaged header is never
followed. Each function returns what is wrong, or ''.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_shards.cameras import camera_problem
from data_shards.fields import is_by_row
from data_shards.schema import ITEM_BYTES, ClipEntry, DatasetInfo, MemberEntry, plain
from data_shards.storage.files import all_finite, array_from_bytes, crc32c, npy_header
from data_shards.storage.index import entry_name
from data_shards.storage.remote import open_file, read_whole
from data_shards.storage.write import BLOCK, shard_size, tar_header
from data_shards.storage.zarr_store import pieces, shard_files

CHUNK = 4 * 2**20  # bytes in memory at a time
TAR_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.DIRTYPE: "a directory",
    tarfile.FIFOTYPE: "a fifo",
}
CAMERA = ("c2w.npy", "intrinsics.npy")
MAX_CAMERA_BYTES = 64 * 2**20  # of a clip; no more are kept to be judged
Rows = Sequence[tuple[ClipEntry, tuple[MemberEntry, ...]]]
Kept = dict[tuple[str, str], bytearray]  # (key, member) -> its numbers


@dataclass(frozen=True)
class Problem:
    shard: str
    key: str
    field: str
    what: str

    def __str__(self) -> str:
        text = f"{self.what} (shard {self.shard}, key {self.key}, field {self.field})"
        return plain(text).replace("\n", "\\n")


def describe_header(block: bytes, expected: bytes) -> str:
    """Return the error in a 512-byte tar header, for the report only."""
    name = expected[:100].rstrip(b"\0").decode()
    if len(block) < BLOCK:
        return f"tar header: the shard ends inside it, expected member {name!r}"
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        return f"tar header: got a damaged one ({error}), expected member {name!r}"
    if found.type in TAR_KINDS:
        return f"tar header: got {TAR_KINDS[found.type]} {found.name!r}, expected the file {name!r}"
    if found.name != name:
        return f"tar header: got member {found.name!r}, expected {name!r}"
    return (
        f"tar header: got size {found.size} or other facts than were written, expected those of"
        f" {name!r}"
    )


def check_payload(
    file: BinaryIO, member: MemberEntry, expected_header: bytes, kept: bytearray | None
) -> str:
    """Read a member of a tar and return what is wrong with it, or ''. kept: see `check_rows`."""
    header = file.read(len(expected_header))
    problem = (
        ""
        if header == expected_header
        else f"npy header: got another one than {member.dtype} {member.shape}"
    )
    total, wrong = check_rows(
        file, member, 0, member.length - len(expected_header), crc32c(header), kept
    )
    return (
        problem
        or wrong
        or ("" if total == member.crc32c else "checksum: got other bytes than were written")
    )


def check_rows(
    file: BinaryIO,
    member: MemberEntry,
    row: int,
    length: int,
    total: int,
    kept: bytearray | None = None,
) -> tuple[int, str]:
    """Read `length` bytes, the rows from `row` on, and check them.

    Returns (checksum of all bytes so far, given `total` of those before; what is wrong or ''). At
    most CHUNK bytes are in memory, whatever the index claims. kept: the bytes are added to it.
    """
    problem, by_row = "", is_by_row(member.field)
    size = member.row_bytes if by_row else length
    while length:
        place, row_crc, left = f", {entry_name(member)} {row}" if by_row else "", 0, size
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                return total, f"member: the shard ends {length - size + left} bytes before it does"
            left -= len(data)
            total, row_crc = crc32c(data, total), crc32c(data, row_crc)
            if kept is not None:
                kept += data
            problem = problem or not_finite(data, member, place)
        if by_row and row_crc != member.row_crc32c[row]:
            problem = problem or f"checksum: got other bytes than were written{place}"
        row, length = row + 1, length - size
    return total, problem


def not_finite(data: bytes, member: MemberEntry, place: str) -> str:
    """Return a message about elements that are NaN or infinite; '' if all are finite or bytes are
    cut."""
    count, rest = divmod(len(data), ITEM_BYTES[member.dtype])
    if rest or all_finite(array_from_bytes(data, member.dtype, (count,)), member.dtype):
        return ""
    return f"values: got NaN or infinite ones{place}"


def check_cameras(shard: str, rows: Rows, kept: Kept, info: DatasetInfo) -> Iterator[Problem]:
    """Yield the clips whose poses and intrinsics, as read, are those of no camera of their
    pictures."""
    size, cropped = (info.image_height, info.image_width), info.spatial_stride
    for entry, members in rows:
        named = {member.field: member for member in members if member.field in CAMERA}
        read = [kept.get((entry.key, field), b"") for field in CAMERA]
        if len(named) < len(CAMERA) or not all(read):
            continue
        c2w, intrinsics = (
            array_from_bytes(bytes(data), named[field].dtype, named[field].shape)
            for field, data in zip(CAMERA, read, strict=True)
        )
        if what := camera_problem(c2w, intrinsics, *size, cropped):
            yield Problem(shard, entry.key, CAMERA[0], what)


def room_for(kept: Kept, key: str, member: MemberEntry) -> bytearray | None:
    """Return where to keep the bytes of a camera; None for other members."""
    if member.field not in CAMERA or member.length > MAX_CAMERA_BYTES:
        return None
    return kept.setdefault((key, member.field), bytearray())


def verify_shard(
    file: BinaryIO, size: int, shard: str, rows: Rows, info: DatasetInfo
) -> list[Problem]:
    """Read a shard once, from start to end, and list the deviations from the index."""
    problems, kept = [], Kept()
    members = sorted(
        ((m.offset, entry.key, m) for entry, group in rows for m in group), key=lambda item: item[0]
    )
    expected_size = shard_size(m for _, _, m in members)
    if size != expected_size:
        problems.append(
            Problem(shard, "-", "-", f"shard size: got {size} bytes, expected {expected_size}")
        )
    position = 0
    for offset, key, member in members:
        if offset - BLOCK != position:
            problems.append(
                Problem(
                    shard,
                    key,
                    member.field,
                    f"index: got offset {offset}, expected {position + BLOCK}",
                )
            )
            return problems
        expected = tar_header(f"{key}.{member.field}", member.length)
        block = file.read(BLOCK)
        if block != expected:
            problems.append(Problem(shard, key, member.field, describe_header(block, expected)))
        npy = b"" if member.field == "json" else npy_header(member.dtype, member.shape)
        problem = check_payload(file, member, npy, room_for(kept, key, member))
        if problem:
            problems.append(Problem(shard, key, member.field, problem))
        padding = -member.length % BLOCK
        if file.read(padding) != b"\0" * padding and not problem:
            problems.append(
                Problem(
                    shard,
                    key,
                    member.field,
                    "padding: got bytes after the member that are not zero",
                )
            )
        position = offset + member.length + padding
    if file.read(2 * BLOCK) != b"\0" * (2 * BLOCK) or file.read(1):
        problems.append(
            Problem(
                shard, "-", "-", "end of shard: got something else than two zero blocks and the end"
            )
        )
    return problems or list(check_cameras(shard, rows, kept, info))


def verify_zarr(
    filesystem: Any, folder: str, shard: str, rows: Rows, info: DatasetInfo
) -> list[Problem]:
    """Check every file of a Zarr shard, and that there are no others.

    Each file has one right content, which follows from the index.
    """
    kept = Kept()
    problems, expected = (
        [],
        shard_files((entry.key, member) for entry, members in rows for member in members),
    )
    found = {name[len(folder) + 1 :] for name in filesystem.find(folder)}
    problems += [
        Problem(shard, "-", "-", f"file: got {name}, which `encode` does not write")
        for name in sorted(found - set(expected))
    ]
    for name, (length, content) in expected.items():
        if not length and (what := differs(filesystem, f"{folder}/{name}", content)):
            key, _, field = name.removesuffix("zarr.json").rstrip("/").partition("/")
            problems.append(Problem(shard, key or "-", field or "-", f"zarr.json: {what}"))
    for entry, members in rows:
        for member in members:
            total, row, problem = 0, 0, ""
            for piece in pieces(entry.key, member, 0, member.shape[0]):
                total, wrong = check_piece(
                    filesystem,
                    f"{folder}/{piece.name}",
                    expected[piece.name],
                    member,
                    row,
                    total,
                    room_for(kept, entry.key, member),
                )
                row, problem = row + piece.length // max(1, member.row_bytes), problem or wrong
            if problem or total != member.crc32c:
                problems.append(
                    Problem(
                        shard,
                        entry.key,
                        member.field,
                        problem or "checksum: got other bytes than were written",
                    )
                )
    return problems or list(check_cameras(shard, rows, kept, info))


def check_piece(
    filesystem: Any,
    path: str,
    expected: tuple[int, bytes],
    member: MemberEntry,
    row: int,
    total: int,
    kept: bytearray | None,
) -> tuple[int, str]:
    """Check one file of an array like `check_rows`, and what follows the rows in it."""
    length, rest = expected
    try:
        with open_file(filesystem, path) as file:
            size = filesystem.size(path)
            if size != length + len(rest):
                return (
                    total,
                    (
                        f"file: got {size} bytes, expected {length + len(rest)} in"
                        f" {path.rsplit('/', 1)[1]}"
                    ),
                )
            total, wrong = check_rows(file, member, row, length, total, kept)
            return total, wrong or (
                ""
                if file.read() == rest
                else "checksum: got other bytes than were written behind the rows"
            )
    except OSError as error:
        return total, f"file: cannot read it ({type(error).__name__}: {error})"


def differs(filesystem: Any, path: str, content: bytes) -> str:
    """Return the error in a file whose expected content is given; '' if there is none."""
    try:
        return (
            ""
            if read_whole(filesystem, path) == content
            else "got other bytes than `encode` writes for what the index says"
        )
    except OSError as error:
        return f"cannot read it ({type(error).__name__}: {error})"
