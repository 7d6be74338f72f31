"""Wrap addresses of the stores that fsspec supports; `storage.place` makes them.

A module of its own: it needs universal_pathlib, and a run on local folders does not.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from upath.extensions import ProxyUPath

from data_shards.storage.remote import RetryPolicy, fetch, read_whole, speaks_http


class Remote(ProxyUPath):
    """Wrap an address such as s3://bucket/runs: a UPath whose methods raise OSError for any error
    of the store's library, and never take an unreachable store for an empty one."""

    def iterdir(self) -> Iterator[Remote]:
        """Return what is directly under this address, by name; nothing if there is nothing."""
        # UPath asks `isdir` first, which in many stores is False when the store does not answer:
        # a run would then begin anew beside its checkpoints
        with _as_os_errors(self):
            try:
                if speaks_http(self.fs):
                    read_whole(self.fs, self.path)  # the page behind the list must have an end
                listed = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                listed = []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in listed}
        return iter([self / name for name in sorted(names - {"", self.name})])

    def is_dir(self) -> bool:
        return any(self.iterdir())

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    @contextmanager
    def open(self, mode: str = "r", **options: Any) -> Iterator[Any]:  # type: ignore[override]
        """Open a file. `x` is taken as `w`: names are fresh, and few stores can tell."""
        with _as_os_errors(self), super().open(mode.replace("x", "w"), **options) as file:
            yield file

    def read_text(  # type: ignore[override]
        self, encoding: str = "utf-8", errors: str = "strict"
    ) -> str:
        return self.read(None, None).decode(encoding, errors)

    def read(self, start: int | None, stop: int | None) -> bytes:
        """Return bytes [start, stop); of a web server that sends more, an OSError."""
        with _as_os_errors(self):
            if speaks_http(self.fs):
                if stop is None:
                    return read_whole(self.fs, self.path)[start:]
                return fetch(self.fs, self.path, start or 0, stop, RetryPolicy())
            return bytes(self.fs.cat_file(self.path, start=start, end=stop))

    def unlink(self, missing_ok: bool = False) -> None:
        with _as_os_errors(self):
            self.fs.rm_file(self.path)

    def remove(self) -> None:
        """Delete everything under this address."""
        with _as_os_errors(self):
            # `rm` expands `[ ] * ?`: unescaped, run[1] would delete what lies in run1
            self.fs.rm(glob.escape(self.path), recursive=True)


@contextmanager
def _as_os_errors(file: Remote) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    # every store has its own; callers know what to do with a file that cannot be read or written
    except Exception as error:
        raise OSError(f"{file}: {type(error).__name__}: {error}") from error
