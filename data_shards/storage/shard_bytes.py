"""Fetch the bytes of shards.

A local file is read straight into the caller's buffer, block by block; other places go through
fsspec, with retries and a cache of ranges. Wrong or unreadable bytes become one ShardError naming
shard, key and field.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data_shards.schema import ClipEntry, MemberEntry, ShardError
from data_shards.storage.files import check_regular
from data_shards.storage.index import where
from data_shards.storage.remote import (
    RangeCache,
    RetryPolicy,
    ShortRead,
    fetch,
    is_transient,
    with_retries,
)
from data_shards.storage.zarr_store import Piece, pieces

LARGE_READ = 64 * 2**20
BLOCK_BYTES = 512 * 1024  # of a local file read and checked at a time: fits the second-level cache
REPAIR = "copy the shard again, or encode again; `python -m data_shards.verify` lists all damage"
# (bytes, their offset in the piece) -> error message, empty if valid
Wrong = Callable[[NDArray[np.uint8], int], str]


class ShardBytes:
    """Fetch bytes of the shards of one data set. name: distinguishes its ranges in the cache."""

    def __init__(
        self, filesystem: Any, root: str, name: str, policy: RetryPolicy, cache: RangeCache | None
    ) -> None:
        self._fs, self._root, self._name, self._policy, self._cache = (
            filesystem,
            root,
            name,
            policy,
            cache,
        )
        self._local = type(filesystem) is LocalFileSystem
        self._direct = self._local and cache is None

    def rows(
        self,
        entry: ClipEntry,
        member: MemberEntry,
        piece: Piece,
        into: NDArray[np.uint8] | None,
        wrong: Wrong,
    ) -> NDArray[np.uint8]:
        """Return a piece of whole rows by the fastest way; in `into` if that is given."""
        return (self.by_blocks if self._direct else self.at_once)(entry, member, piece, into, wrong)

    def by_blocks(
        self,
        entry: ClipEntry,
        member: MemberEntry,
        piece: Piece,
        into: NDArray[np.uint8] | None,
        wrong: Wrong,
    ) -> NDArray[np.uint8]:
        """Read a piece of a local file, checking each block while it is in the CPU cache."""
        step, length, end = (
            max(1, BLOCK_BYTES // member.row_bytes) * member.row_bytes,
            piece.length,
            piece.offset + piece.length,
        )

        def attempt() -> tuple[NDArray[np.uint8], str]:
            problem = ""
            # O_NONBLOCK: a pipe in place of the shard must not wait for a writer
            file = os.open(f"{self._root}/{piece.name}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                facts = os.fstat(file)
                check_regular(facts.st_mode)
                size = facts.st_size
                if size < end:  # before a wrong index makes us allocate its gigabytes
                    return (
                        np.empty(0, np.uint8),
                        f"shard: got {size} bytes, expected at least {end} {where(entry, member)}",
                    )
                data = np.empty(length, np.uint8) if into is None else into
                read_ahead(file, piece.offset, length)
                for at in range(0, length, step):
                    block = data[at : at + step]
                    read_fully(file, block, piece.offset + at)
                    problem = problem or wrong(block, at)
                return data, problem
            finally:
                os.close(file)

        try:
            data, problem = with_retries(attempt, self._policy)
        except OSError as error:
            raise self._unreadable(error, entry, member) from error
        if problem:
            raise ShardError(f"{problem}. Fix: {REPAIR}", entry.shard)
        return data

    def at_once(
        self,
        entry: ClipEntry,
        member: MemberEntry,
        piece: Piece,
        into: NDArray[np.uint8] | None,
        wrong: Wrong,
    ) -> NDArray[np.uint8]:
        """Read a piece of any file, through fsspec and the cache.

        Wrong bytes are read a second time: they may be damaged in transfer, or in the cache.
        """
        path, problem = f"{self._root}/{piece.name}", ""
        end, identity = piece.offset + piece.length, f"{self._name} {piece}"

        def fill() -> bytes:
            # an index with wrong sizes must not make us allocate its gigabytes
            if piece.length > LARGE_READ and end > self._fs.size(path):
                raise ValueError(f"it ends before byte {end}")
            return fetch(self._fs, path, piece.offset, end, self._policy)

        if not piece.length:
            return np.empty(0, np.uint8)
        for _ in range(2):
            try:
                data = np.frombuffer(
                    (
                        fill()
                        if self._cache is None
                        else self._cache.get(identity, piece.length, fill)
                    ),
                    np.uint8,
                )
            except (OSError, ValueError) as error:
                raise self._unreadable(error, entry, member) from error
            if len(data) != piece.length:
                problem = (
                    f"shard: got {len(data)} bytes, expected {piece.length} from byte"
                    f" {piece.offset} {where(entry, member)}"
                )
            else:
                problem = wrong(data, 0)
            if not problem:
                break
            if self._cache is not None:
                self._cache.drop(identity)
        if problem:
            raise ShardError(f"{problem}. Fix: {REPAIR}", entry.shard)
        if into is not None:
            into[:] = data
        return data if into is None else into

    def _unreadable(self, error: Exception, entry: ClipEntry, member: MemberEntry) -> ShardError:
        """Return the error for a shard that could not be read within the retry budget.

        Storage that does not answer may answer later (`passing`); a file that is missing, not
        readable or on a disk's bad sectors counts as damaged.
        """
        passing = is_transient(error) and not (
            self._local and getattr(error, "errno", None) == errno.EIO
        )
        what = f"shard: cannot read it ({type(error).__name__}: {error}) {where(entry, member)}"
        fix = "see that storage answers, then run the same command again" if passing else REPAIR
        return ShardError(f"{what}. Fix: {fix}", entry.shard, passing)


def lies_in(entry: ClipEntry, member: MemberEntry, start: int, stop: int) -> Iterator[Piece]:
    """Yield the pieces of the rows [start, stop) of a member, named from the data set's folder."""
    if entry.shard.endswith(".zarr"):
        yield from (
            piece._replace(name=f"{entry.shard}/{piece.name}")
            for piece in pieces(entry.key, member, start, stop)
        )
    else:
        yield Piece(
            entry.shard,
            member.data_offset + start * member.row_bytes,
            (stop - start) * member.row_bytes,
        )


def joined(members: Sequence[MemberEntry], gap: int) -> list[list[MemberEntry]]:
    """Group members that are read at once: in file order, at most `gap` bytes between them."""
    groups: list[list[MemberEntry]] = []
    for member in sorted(members, key=lambda member: member.offset):
        if (
            groups
            and gap >= 0
            and member.offset - (groups[-1][-1].offset + groups[-1][-1].length) <= gap
        ):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def read_ahead(file: int, offset: int, length: int) -> None:
    """Request a whole range at once unless it is in memory.

    Storage then fetches the rest of it while the first rows are checked.
    """
    try:
        # in memory, or an error: it does not wait
        os.preadv(file, [bytearray(1)], offset + length - 1, os.RWF_NOWAIT)
    except OSError:
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)


def read_fully(file: int, block: NDArray[np.uint8], offset: int) -> None:
    """Fill the block from a file descriptor; one system call may return less than requested."""
    done = 0
    while done < len(block):
        count = os.preadv(file, [block[done:]], offset + done)  # type: ignore[list-item]
        if count == 0:
            raise ShortRead(f"the shard ends at byte {offset + done}")
        done += count
