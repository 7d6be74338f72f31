"""`python -m data_shards.verify path=…`: every byte of a data set against its index. Exit code 0 if all is well, 1 if not.

A shard is fully determined by its index rows: canonical tar headers, npy headers, payloads with known checksums, zero padding, two zero
blocks, end. So each byte is either right or reported, with shard, key and field; nothing a damaged header *says* is ever followed.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_shards.arguments import Option, run, text, whole
from data_shards.files import all_finite, array_from_bytes, crc32c, npy_header
from data_shards.read import ClipDataset, open_dataset
from data_shards.schema import INDEX, ITEM_BYTES, NULL_TEXT, READ_BY_ROW, SPLITS, ClipEntry, DatasetInfo, MemberEntry, ShardError
from data_shards.write import BLOCK, fingerprint, shard_size, tar_header
from data_shards.zarr_store import read_bytes

ABOUT = "Check every byte of a data set against its index. Exit code 1 when something is wrong."
OPTIONS = {
    "path": Option(text, "data set folder or URL", required=True),
    "workers": Option(whole(1, 1024), "processes", 1),
    "show": Option(whole(0, 10**6), "problems to print", 50),
}
CHUNK = 4 * 2**20  # bytes in memory at a time
TAR_KINDS = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.DIRTYPE: "a directory", tarfile.FIFOTYPE: "a fifo"}


@dataclass(frozen=True)
class Problem:
    shard: str
    key: str
    field: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} (shard {self.shard}, key {self.key}, field {self.field})"


Rows = Sequence[tuple[ClipEntry, tuple[MemberEntry, ...]]]


def index_rows(dataset: ClipDataset) -> Iterator[tuple[ClipEntry, tuple[MemberEntry, ...]]]:
    """All rows of the index, in its order, each checked."""
    entries = sorted((entry for split in SPLITS for entry in dataset.clips(split)), key=lambda entry: entry.row)
    for entry in entries:
        yield entry, tuple(dataset.members(entry).values())


def describe_header(block: bytes, expected: bytes) -> str:
    """What is wrong with a 512-byte tar header, for the report only."""
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
    return f"tar header: got size {found.size} or other facts than were written, expected those of {name!r}"


def check_payload(file: BinaryIO, member: MemberEntry, expected_header: bytes) -> str:
    """Read a member and return what is wrong with it, or ''. At most CHUNK bytes are in memory, whatever the index claims."""
    header = file.read(len(expected_header))
    total = crc32c(header)
    problem = "" if header == expected_header else f"npy header: got another one than {member.dtype} {member.shape}"
    by_row = member.field in READ_BY_ROW
    size, count = (member.row_bytes, member.shape[0]) if by_row else (member.length - len(expected_header), 1)
    for row in range(count):
        place, row_crc, left = f", latent frame {row}" if by_row else "", 0, size
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                return f"member: the shard ends {left + (count - 1 - row) * size} bytes before it does"
            left -= len(data)
            total, row_crc = crc32c(data, total), crc32c(data, row_crc)
            problem = problem or not_finite(data, member, place)
        if by_row and row_crc != member.row_crc32c[row]:
            problem = problem or f"checksum: got other bytes than were written{place}"
    return problem or ("" if total == member.crc32c else "checksum: got other bytes than were written")


def not_finite(data: bytes, member: MemberEntry, place: str) -> str:
    """What to say of elements that are NaN or infinite; '' where all are finite, or the bytes are cut."""
    count, rest = divmod(len(data), ITEM_BYTES[member.dtype])
    if rest or member.dtype == "uint8" or all_finite(array_from_bytes(data, member.dtype, (count,)), member.dtype):
        return ""
    return f"values: got NaN or infinite ones{place}"


def verify_shard(file: BinaryIO, size: int, shard: str, rows: Rows) -> list[Problem]:
    """Read a shard once, from start to end, and list what differs from the index."""
    problems = []
    members = sorted(((m.offset, entry.key, m) for entry, group in rows for m in group), key=lambda item: item[0])
    expected_size = shard_size(m for _, _, m in members)
    if size != expected_size:
        problems.append(Problem(shard, "-", "-", f"shard size: got {size} bytes, expected {expected_size}"))
    position = 0
    for offset, key, member in members:
        if offset - BLOCK != position:
            problems.append(Problem(shard, key, member.field, f"index: got offset {offset}, expected {position + BLOCK}"))
            return problems
        expected = tar_header(f"{key}.{member.field}", member.length)
        block = file.read(BLOCK)
        if block != expected:
            problems.append(Problem(shard, key, member.field, describe_header(block, expected)))
        npy = b"" if member.field == "json" else npy_header(member.dtype, member.shape)
        problem = check_payload(file, member, npy)
        if problem:
            problems.append(Problem(shard, key, member.field, problem))
        padding = -member.length % BLOCK
        if file.read(padding) != b"\0" * padding and not problem:
            problems.append(Problem(shard, key, member.field, "padding: got bytes after the member that are not zero"))
        position = offset + member.length + padding
    if file.read(2 * BLOCK) != b"\0" * (2 * BLOCK) or file.read(1):
        problems.append(Problem(shard, "-", "-", "end of shard: got something else than two zero blocks and the end"))
    return problems


def verify_zarr(path: str, shard: str, rows: Rows) -> list[Problem]:
    """Every array of a Zarr shard, read through Zarr and compared with the index."""
    problems = []
    for entry, members in rows:
        for member in members:
            step = max(1, CHUNK // max(member.row_bytes, 1))
            total, count, problem = 0, member.shape[0], ""
            try:
                for start in range(0, count, step):
                    data = read_bytes(path, entry, member, start, min(start + step, count))
                    total = crc32c(data, total)
                    problem = problem or not_finite(data, member, f", from row {start}")
            except ShardError as error:
                problems.append(Problem(shard, entry.key, member.field, str(error)))
                continue
            if total != member.crc32c:
                problem = "checksum: got other bytes than were written"
            if problem:
                problems.append(Problem(shard, entry.key, member.field, problem))
    return problems


def verify_one(path: str, shard: str, rows: Rows) -> list[Problem]:
    import fsspec

    if shard.endswith(".zarr"):
        return verify_zarr(path, shard, rows)
    filesystem, root = fsspec.core.url_to_fs(path)
    name = f"{root.rstrip('/')}/{shard}"
    try:
        with filesystem.open(name, "rb") as file:
            return verify_shard(file, filesystem.size(name), shard, rows)
    except OSError as error:
        return [Problem(shard, "-", "-", f"shard: cannot read it ({type(error).__name__}: {error})")]


def check_null_text(dataset: ClipDataset) -> list[Problem]:
    if dataset.info.null_text is None:
        return []
    try:
        found = crc32c(dataset.file_bytes(NULL_TEXT))
    except OSError as error:
        return [Problem("-", "-", NULL_TEXT, f"null text: cannot read it ({type(error).__name__}: {error})")]
    return [] if found == dataset.info.null_text_crc32c else [Problem("-", "-", NULL_TEXT, "checksum: got other bytes than were written")]


def verify_dataset(path: str, workers: int = 1, progress: Any = iter) -> tuple[DatasetInfo, list[Problem], set[str]]:
    """(facts, problems, shards with a problem). `progress` wraps the list of shards.

    Raises:
        DataError: dataset.json or the index cannot be read at all.
    """
    dataset = open_dataset(path)
    problems = []
    if hashlib.sha256(dataset.file_bytes(INDEX)).hexdigest() != dataset.info.index_sha256:
        changed = "index: got other bytes than dataset.json states; nothing it says about the shards can be trusted"
        return dataset.info, [Problem("-", "-", "-", changed)], set()
    rows = list(index_rows(dataset))
    if fingerprint(rows, dataset.info) != dataset.info.fingerprint:
        problems.append(Problem("-", "-", "-", "fingerprint: index and dataset.json do not belong together"))
    problems += check_null_text(dataset)
    shards: dict[str, list[Any]] = {}
    keys: set[str] = set()
    for entry, members in rows:
        if entry.key in keys:
            problems.append(Problem(entry.shard, entry.key, "-", "clip key: got it twice, expected unique keys"))
        keys.add(entry.key)
        shards.setdefault(entry.shard, []).append((entry, members))
    if len(shards) != dataset.info.shards:
        problems.append(Problem("-", "-", "-", f"index: got {len(shards)} shards, expected {dataset.info.shards}"))
    if workers == 1:
        for shard in progress(list(shards)):
            problems += verify_one(path, shard, shards[shard])
    else:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(verify_one, path, shard, shards[shard]) for shard in shards]
            for future in progress(futures):
                problems += future.result()
    return dataset.info, problems, {problem.shard for problem in problems if problem.shard != "-"}


def verify(path: str, workers: int, show: int) -> int:
    from rich.progress import track

    info, problems, bad = verify_dataset(path, workers, lambda items: track(items, "verify"))
    clips = sum(info.clips.values())
    if not problems:
        print(f"{path}: every byte of {info.shards} shards is as written: {clips} clips, {info.latent_frames} latent frames")
        print(f"fingerprint {info.fingerprint}")
        return 0
    print(f"{path}: {len(problems)} problems in {len(bad)} of {info.shards} shards", file=sys.stderr)
    for problem in problems[:show]:
        print(f"  - {problem}", file=sys.stderr)
    if len(problems) > show:
        print(f"  … and {len(problems) - show} more (show={len(problems)})", file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    return run("python -m data_shards.verify", ABOUT, OPTIONS, verify, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
