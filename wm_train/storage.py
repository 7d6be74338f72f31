"""Where checkpoints lie: a local folder (a Path), or a prefix of any store that fsspec knows
(s3://, gs://, memory://).

`Remote` has the few verbs of a Path that checkpoints use. A store has no rename and no folders of
its own; what is written appears whole when it is closed, so a checkpoint counts from the moment its
manifest, which goes last, is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Remote:
    """An address such as s3://bucket/runs. Errors: OSError, whatever the store's library raises."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def iterdir(self) -> list[Remote]:
        """What is directly under this address; nothing if there is nothing."""
        with _as_os_errors(self.url):
            try:
                listed = _filesystem(self.url).ls(_path(self.url), detail=False)
            except FileNotFoundError:
                return []
            names = [str(path).rstrip("/").rpartition("/")[2] for path in listed]
            return [self / name for name in sorted(set(names)) if name and name != self.name]

    def is_dir(self) -> bool:
        return bool(self.iterdir())

    def is_file(self) -> bool:
        with _as_os_errors(self.url):
            return bool(_filesystem(self.url).isfile(_path(self.url)))

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    @contextmanager
    def open(self, mode: str, encoding: str | None = None) -> Iterator[Any]:
        """`x` is taken as `w`: names are fresh, and a store cannot tell."""
        with (
            _as_os_errors(self.url),
            _filesystem(self.url).open(
                _path(self.url), mode.replace("x", "w"), encoding=encoding
            ) as file,
        ):
            yield file

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read(None, None).decode(encoding, errors)

    def read(self, start: int | None, stop: int | None) -> bytes:
        """Bytes [start, stop)."""
        with _as_os_errors(self.url):
            return bytes(_filesystem(self.url).cat_file(_path(self.url), start=start, end=stop))

    def unlink(self) -> None:
        with _as_os_errors(self.url):
            _filesystem(self.url).rm_file(_path(self.url))

    def remove(self) -> None:
        """Everything under this address."""
        with _as_os_errors(self.url):
            _filesystem(self.url).rm(_path(self.url), recursive=True)


Place = Path | Remote


def place(address: str) -> Place:
    """A folder, or an address with a protocol."""
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return Remote(address) if "://" in address else Path(address)


def _filesystem(url: str) -> Any:
    return _store(url.partition("://")[0])


@cache
def _store(protocol: str) -> Any:
    import fsspec

    return fsspec.filesystem(
        protocol, use_listings_cache=False
    )  # others write, so what was listed before is out of date


def _path(url: str) -> str:
    return str(_filesystem(url)._strip_protocol(url))


@contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    # every store has its own; callers know what to do with a file that cannot be read or written
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
