"""Compute digests of the files that a clip is made of, by which `encode` sees what has changed.

Nothing is stored: each start reads the files again, at the speed of the disk or of SHA-256 (about 1
GB/s), which is little beside decoding. Size and time alone would miss an edited file whose time was
put back, and see a change in each copy.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.storage.files import open_regular

LENGTH = 32  # hexadecimal digits that are kept: 128 bits
Stamp = tuple[str, int, int, int, int]


def digest(data: bytes) -> str:
    """Return the digest of some bytes."""
    return hashlib.sha256(data).hexdigest()[:LENGTH]


def digest_arrays(arrays: Iterable[NDArray[Any]]) -> str:
    """Return the digest of some arrays of numbers."""
    return digest(b"".join(repr((a.dtype.str, a.shape)).encode() + a.tobytes() for a in arrays))


def digest_file(path: Path) -> str:
    """Return the digest of a file's content.

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        with open_regular(path) as file:  # a pipe would be waited for
            return hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]
    except OSError as error:
        raise DataError(
            f"source: cannot read {path} ({error.strerror}), expected a file. Fix: see its access"
            " rights"
        ) from error


def list_files(path: Path) -> list[Path]:
    """Return a file, or the files of a folder at any depth, in order of their names; hidden ones
    are left out."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in found if not any(map(is_hidden, file.relative_to(path).parts))]


def is_hidden(name: str) -> bool:
    """Return True for names such as `._clip.mp4`, which desktops write beside a user's files."""
    return name.startswith(".")


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that match, in order of their names, without hidden ones."""
    return sorted(file for file in folder.glob(pattern) if not is_hidden(file.name))


class FileDigests:
    """Keep the digests of files that several clips share, within one process; thread-safe.

    A file whose size, times or place on the disk differ is read again. The change time (ctime)
    moves with every write and cannot be put back, so a change during the run is seen.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Stamp, Future[str]] = {}

    def of(self, path: Path) -> str:
        """Return the digest of a file; a second thread waits for the first instead of reading it
        too."""
        try:
            facts = os.stat(path)
        except OSError as error:
            raise DataError(
                f"source: cannot read {path} ({error.strerror}), expected a file. Fix: leave the"
                " source alone while encoding"
            ) from error
        stamp = (str(path), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
        with self._lock:
            mine = stamp not in self._known
            future = self._known.setdefault(stamp, Future())
        if mine:
            try:
                future.set_result(digest_file(path))
            except DataError as error:
                future.set_exception(error)
        return future.result()
