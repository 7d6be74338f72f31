"""Write the output of `encode` to a folder, or to a prefix of an object store.

Every file that appears under its name is complete. On a disk the work is done in `<out>.partial`,
which is renamed at the end. An object store cannot rename, so objects have their final names at
once; they are a data set only with dataset.json, which is written last. A shard is made on a local
disk and uploaded when complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from data_shards.schema import FACTS, DataError
from data_shards.storage.files import publish_folder, write_durably
from data_shards.storage.remote import RetryPolicy, connect, is_transient, read_whole, with_retries

T = TypeVar("T")
POLICY = RetryPolicy(read_timeout_s=60.0)
TOGETHER = 16  # small files that are read or removed at a time


def parts_of(name: str) -> list[str]:
    """Return a file's name, and those of the folders that it is in."""
    return [name, *map(str, PurePosixPath(name).parents)]


class Target:
    """Write one data set. place: the folder or URL that is being filled; out: its final name."""

    def __init__(self, out: str) -> None:
        self.in_store = "://" in out
        # workers may be elsewhere
        self.out = out.rstrip("/") if self.in_store else str(Path(out).absolute())
        self.place = self.out if self.in_store else f"{self.out}.partial"
        self._fs, self._root = connect(self.place, POLICY)
        self._final = connect(self.out, POLICY)[1]

    def finished(self) -> bool:
        """Return True if the data set exists already.

        Raises:
            DataError: something else exists there.
        """
        self._fs.invalidate_cache()
        if self._try(lambda: self._fs.exists(f"{self._final}/{FACTS}")):
            return True
        if not self.in_store and self._fs.exists(self._final):
            raise DataError(
                f"out: got {self.out}, which exists and is no data set, expected a new folder. Fix:"
                " out=<another folder>"
            )
        return False

    def prepare(self) -> None:
        """Create the folders, and remove what an interrupted run had not finished."""
        for name in () if self.in_store else ("shards", "rows"):
            folder = Path(self.place) / name
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("*.tmp-*"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def write(self, name: str, data: bytes) -> None:
        if self.in_store:
            self._try(lambda: self._fs.pipe_file(f"{self._root}/{name}", data))
        else:
            write_durably(Path(self.place) / name, data)

    def read(self, name: str, done: bool = False) -> bytes | None:
        """Return a file, or None if there is none; `done`: of the finished data set."""
        try:
            return self._try(
                lambda: read_whole(self._fs, f"{self._final if done else self._root}/{name}")
            )
        except FileNotFoundError:
            return None

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the files of these names, in their order."""
        with ThreadPoolExecutor(TOGETHER) as pool:  # not `cat`: it takes [ ] * ? for patterns
            yield from pool.map(self._read_object, names)

    def _read_object(self, name: str) -> bytes:
        return self._try(lambda: bytes(self._fs.cat_file(f"{self._root}/{name}")))

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes of all existing files."""
        self._fs.invalidate_cache()
        found = self._try(lambda: self._fs.find(self._root, detail=True))
        return {path[len(self._root) + 1 :]: facts["size"] for path, facts in found.items()}

    @contextmanager
    def room(self, name: str) -> Iterator[Path]:
        """Yield a path to write the shard `name` to; on exit it is stored under that name."""
        if not self.in_store:
            yield Path(self.place) / name
            return
        with tempfile.TemporaryDirectory(prefix="encode-") as folder:
            made = Path(folder) / Path(name).name
            yield made
            files = (
                [file for file in sorted(made.rglob("*")) if file.is_file()]
                if made.is_dir()
                else [made]
            )
            self._send(
                {
                    f"{self._root}/{Path(name).parent / file.relative_to(folder)}": file
                    for file in files
                },
                f"{self._root}/{name}",
            )

    def _send(self, files: Mapping[str, Path], prefix: str) -> None:
        """Upload files whose names all start with `prefix`."""

        def attempt() -> None:
            self._fs.put([str(file) for file in files.values()], list(files))
            self._fs.invalidate_cache()
            there = {
                path: facts["size"] for path, facts in self._fs.find(prefix, detail=True).items()
            }
            short = [path for path, file in files.items() if there.get(path) != file.stat().st_size]
            if short:
                raise OSError(
                    f"{short[0]} has {there.get(short[0], 0)} bytes,"
                    f" {files[short[0]].stat().st_size} were sent"
                )

        self._try(attempt)

    def _try(self, what: Callable[[], T]) -> T:
        """Call a function with retries; a store's final error becomes a DataError."""
        try:
            return with_retries(what, POLICY)
        except FileNotFoundError:
            raise
        except OSError as error:
            if not self.in_store:
                raise
            raise DataError(
                f"out: cannot write to {self.out} ({type(error).__name__}: {error}), expected a"
                " store that can be written. Fix: see access rights and the network, then run the"
                " same command again: it goes on where it stopped",
                is_transient(error),
            ) from error

    def remove(self, *names: str) -> None:
        """Remove files, and folders with everything in them."""
        if not self.in_store:
            for path in (Path(self.place) / name for name in names):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
            return
        there = self.sizes() if names else ()
        gone = [file for file in there if any(part in names for part in parts_of(file))]
        with ThreadPoolExecutor(TOGETHER) as pool:  # not `rm`, which takes patterns
            list(pool.map(self._remove_object, gone))

    def _remove_object(self, name: str) -> None:
        self._try(lambda: self._fs.rm_file(f"{self._root}/{name}"))

    def rename(self, name: str, to: str) -> None:
        """Rename a file or folder; not in a store."""
        target = Path(self.place) / to
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # what an earlier run had set aside: the same
        os.replace(Path(self.place) / name, target)

    def publish(self) -> None:
        """Rename the finished folder to its final name."""
        if not self.in_store:
            publish_folder(Path(self.place), Path(self._final))
