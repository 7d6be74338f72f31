"""Read byte ranges from object stores that fail now and then, with retries and a local cache.

Transient failures (connection lost, time-out, 5xx, throttling, a body shorter than requested) are
retried with growing, jittered pauses until `budget_s` is spent. Permanent ones (no such object, no
permission) fail at once. The cache never holds part of a range. The reader checks if the bytes are
right: it verifies every row.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from data_shards.schema import DataError, DatasetInfo
from data_shards.storage.endless import MOST_WHOLE, EndlessError
from data_shards.storage.facts import info_from_json
from data_shards.storage.files import NotRegular, check_regular, open_regular

T = TypeVar("T")
# what a client library may raise for a lost connection; others (a bug, a wrong argument) are not
# retried
TRANSIENT_NAMES = (
    "ClientError",
    "ServerDisconnectedError",
    "ClientPayloadError",
    "EndpointConnectionError",
    "HTTPClientError",
    "ResponseStreamingError",
)
# packages whose own exceptions are about a store
CLIENTS = ("botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google")
CACHE_FOLDER = "wm_train_ranges"
RANGE, DRAFT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{64}\.tmp-\d+-\d+")
BUSY = (408, 425, 429)  # HTTP statuses below 500 that ask to retry later


class ShortRead(OSError):
    """Report that fewer bytes arrived than requested, though the object is long enough."""


class StoreError(OSError):
    """Wrap an error of a client library that is not an OSError."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.transient = is_transient(error)


PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotRegular, EndlessError),
)


@dataclass(frozen=True)
class RetryPolicy:
    """Store time-outs, and how long to retry."""

    budget_s: float = 60.0  # for one range, all attempts together
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0


def connect(path: str, policy: RetryPolicy) -> tuple[Any, str]:
    """Return (filesystem, path in it) of a folder or fsspec URL.

    Raises:
        DataError: no such kind of store, or its library is not installed.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(path, **storage_options(path, policy))
    except (ValueError, ImportError) as error:
        raise DataError(
            f"path: got {path!r}, expected a folder or a URL that fsspec opens ({error})"
        ) from error
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs tries five times by itself, which our budget would not see
    return filesystem, root.rstrip("/")


def read_info(path: str, policy: RetryPolicy) -> tuple[Any, str, DatasetInfo]:
    """Return (filesystem, path in it, facts) of the data set in a folder or at an fsspec URL.

    Raises:
        DataError: no dataset.json there, one that this version cannot read, or a store that does
        not answer.
    """
    filesystem, root = connect(path, policy)
    try:
        text = with_retries(lambda: read_whole(filesystem, f"{root}/dataset.json"), policy)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"data.path: got {path}, which holds no dataset.json, expected a finished data set. "
            f"Fix: python -m data_shards.encode source=<recording> out={path}"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.path: cannot read {path}/dataset.json ({type(error).__name__}: {error}). Fix:"
            " see access rights and the network",
            is_transient(error),
        ) from error
    return filesystem, root, info_from_json(text, f"{path}/dataset.json")


def open_file(filesystem: Any, path: str) -> Any:
    """Open a file of any store for reading; on a disk only a regular one, as a pipe could wait for
    ever."""
    must_be_file(filesystem, path)
    return filesystem.open(path, "rb")


def read_whole(filesystem: Any, path: str) -> bytes:
    """Return the bytes of a file of any store; on a disk only of a regular one."""
    must_be_file(filesystem, path)
    if not speaks_http(filesystem):
        return bytes(filesystem.cat_file(path))
    data = http_bytes(filesystem, path, None, MOST_WHOLE)
    if len(data) > MOST_WHOLE:
        raise EndlessError(f"got more than {MOST_WHOLE:,} bytes, expected a file of a data set")
    return data


def speaks_http(filesystem: Any) -> bool:
    """Return True for a web server: unlike a store, it may send more than it was asked for."""
    protocol = filesystem.protocol
    return "http" in ((protocol,) if isinstance(protocol, str) else protocol)


def http_bytes(filesystem: Any, url: str, start: int | None, stop: int) -> bytes:
    """Return bytes [start, stop) of a web server's answer, and at most one more; start None: the
    whole file. `cat_file` would take an answer without an end into memory."""
    asked = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}
    parts, left = list[bytes](), stop - (start or 0) + 1
    # as a stream, of a size that need not be asked for
    with filesystem.open(url, "rb", block_size=0, size=1, headers=asked) as file:
        if start and file.r.status != 206:
            raise EndlessError("got a whole file for a range of it, expected a server with ranges")
        while left > 0 and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def must_be_file(filesystem: Any, path: str) -> None:
    """Raise NotRegular for a pipe, device or folder on a local disk."""
    if type(filesystem) is LocalFileSystem:
        check_regular(os.stat(path).st_mode)


def storage_options(path: str, policy: RetryPolicy) -> dict[str, Any]:
    """Return fsspec options so that no attempt can hang: time-outs, and no hidden retries."""
    if path.startswith(("s3://", "s3a://")):
        timeouts = {
            "connect_timeout": policy.connect_timeout_s,
            "read_timeout": policy.read_timeout_s,
        }
        bounds = bound_options(path)["config_kwargs"]
        retries = {"max_attempts": 0, "mode": "standard"}
        return {"config_kwargs": {**timeouts, **bounds, "retries": retries}}
    if path.startswith(("http://", "https://")):
        import aiohttp

        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=policy.connect_timeout_s, sock_read=policy.read_timeout_s
        )
        return {"client_kwargs": {"timeout": limits}}
    return {}


def bound_options(path: str) -> dict[str, Any]:
    """Return fsspec options by which no answer and no list of an S3 server is without an end."""
    if not path.startswith(("s3://", "s3a://")):
        return {}
    try:
        from data_shards.storage.s3_bounds import BoundedSession
    except ImportError:  # s3fs is not there: fsspec says so, with the package to install
        return {"config_kwargs": {}}
    return {"config_kwargs": {"http_session_cls": BoundedSession}}


def is_transient(error: BaseException) -> bool:
    """Return True if an attempt that failed so may succeed a little later."""
    if isinstance(error, StoreError):
        return error.transient
    if not isinstance(error, OSError):
        # of aiohttp, of gcsfs
        status = error.status if hasattr(error, "status") else getattr(error, "code", None)
        if isinstance(status, int):
            return status in BUSY or status >= 500
    if str(error).startswith("Forbidden: "):  # gcsfs' word for 403, a plain OSError
        return False
    return not isinstance(error, PERMANENT) and (
        isinstance(error, OSError) or type(error).__name__ in TRANSIENT_NAMES
    )


def with_retries(
    what: Callable[[], T], policy: RetryPolicy, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Call a function until it succeeds, fails for good, or the budget is spent.

    Then the last error is raised, as an OSError if it is a store's.
    """
    started, attempt = time.monotonic(), 0
    while True:
        try:
            return what()
        except Exception as error:
            longest = min(policy.longest_pause_s, policy.first_pause_s * 2**attempt)
            # many ranks fail together: they must not retry together
            pause = random.uniform(0.5, 1.0) * longest
            if not is_transient(error) or time.monotonic() - started + pause > policy.budget_s:
                if (
                    not isinstance(error, OSError)
                    and type(error).__module__.split(".")[0] in CLIENTS
                ):
                    raise StoreError(error) from error
                raise
            sleep(pause)
            attempt += 1


def fetch(filesystem: Any, path: str, start: int, stop: int, policy: RetryPolicy) -> bytes:
    """Return bytes [start, stop) of an object.

    Raises:
        OSError: it does not exist, is not readable or is shorter, or the store did not recover
        within the budget.
    """

    def attempt() -> bytes:
        must_be_file(filesystem, path)
        if speaks_http(filesystem) and start < stop:
            data = http_bytes(filesystem, path, start, stop)
        else:
            data = bytes(filesystem.cat_file(path, start=start, end=stop))
        if len(data) > stop - start:
            raise EndlessError(f"got more than the {stop - start} bytes of a range")
        if len(data) != stop - start and filesystem.size(path) >= stop:
            raise ShortRead(f"got {len(data)} of {stop - start} bytes")
        return data

    return with_retries(attempt, policy)


class RangeCache:
    """Cache ranges as files in a local folder, up to `limit_bytes`.

    They lie in a folder of their own inside it; no file that the cache did not write is touched.
    The least recently used are evicted first. Safe to share between processes: a file is filled
    under another name and renamed, so it is complete or absent; two that fill the same range write
    the same bytes. The folder is checked each time a process has added a hundredth of the limit, so
    that ten processes stay below the limit.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise DataError(
                f"cache size: got {limit_bytes} bytes, expected more than 0. Fix: leave the"
                " cache out"
            )
        self.folder, self.limit_bytes = folder / CACHE_FOLDER, limit_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # since the folder was last checked; others may have filled it before
        self._added = limit_bytes
        for stale, facts in self._files(DRAFT):
            # a younger one may belong to a process that is writing it
            if time.time() - facts.st_mtime > 3600:
                remove_if_there(stale)

    def get(self, identity: str, length: int, fill: Callable[[], bytes]) -> bytes:
        """Return the bytes called `identity`, cached if of the right length, else from `fill`."""
        path = self.folder / hashlib.sha256(identity.encode()).hexdigest()
        with contextlib.suppress(OSError):
            with open_regular(path) as file:
                data = file.read()
            if len(data) == length:
                os.utime(path)
                return data
        data = fill()
        if len(data) == length:
            self._store(path, data)
        return data

    def drop(self, identity: str) -> None:
        """Drop a range, for instance because its bytes turned out to be wrong."""
        remove_if_there(self.folder / hashlib.sha256(identity.encode()).hexdigest())

    def _store(self, path: Path, data: bytes) -> None:
        if len(data) > self.limit_bytes:
            return
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:  # a full disk must not stop training: the range was read, it is not kept
            remove_if_there(temporary)
            return
        with self._lock:
            self._added += len(data)
            if self._added >= self.limit_bytes / 100:
                self._evict()
                self._added = 0

    def _evict(self) -> None:
        """Reduce the cache to nine tenths of the limit, if it is larger."""
        files = [(facts.st_mtime_ns, facts.st_size, file) for file, facts in self._files(RANGE)]
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= 0.9 * self.limit_bytes:
                return
            remove_if_there(file)
            total -= size

    def _files(self, name: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the files that a cache wrote under such names; nothing else in the folder."""
        try:
            found = [file for file in self.folder.iterdir() if name.fullmatch(file.name)]
        except OSError:  # somebody removed the folder: nothing is kept, and nothing is to go
            return
        for file in found:
            with contextlib.suppress(OSError):  # another process may have evicted it
                facts = file.lstat()
                if stat.S_ISREG(facts.st_mode):
                    yield file, facts


def remove_if_there(file: Path) -> None:
    """Remove a file of the cache. One that cannot be removed takes room and harms nothing: the read
    that is being served must not fail for it."""
    with contextlib.suppress(OSError):
        file.unlink()
