"""Locate checkpoints: in a local folder (a Path), or under a prefix of any store that fsspec
supports (s3://, gs://, memory://).

A store has no rename and no folders of its own; what is written appears whole when it is closed, so
a checkpoint counts from the moment its manifest, which goes last, is there.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from wm_train.remote import Remote

Place: TypeAlias = "Path | Remote"


def __getattr__(name: str) -> Any:
    """Import `Remote` at its first use: local folders need no library of stores."""
    if name == "Remote":
        from wm_train.remote import Remote

        return Remote
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def place(address: str) -> Place:
    """Return a folder, or an address with a protocol."""
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    if "://" not in address:
        return Path(address)
    from data_shards.storage.remote import bound_options
    from wm_train.remote import Remote

    # others write to the store, so what was listed before is out of date
    return Remote(address, use_listings_cache=False, **bound_options(address))


def read_regular(path: Path) -> bytes:
    """Return the bytes of a file. Raises OSError, with the file's name, also for a pipe or a
    device in its place, for which a reader could wait for ever."""
    from data_shards.storage.files import open_regular

    with open_regular(path) as file:
        return file.read()


def check_regular(folder: Path) -> None:
    """Raise OSError for a pipe, a socket or a device in a run's folder or in one below it: reading
    or writing it under the name of a file could wait for ever."""
    from data_shards.storage.files import open_regular

    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and not path.is_dir():
            try:
                open_regular(path).close()
            except FileNotFoundError:  # a link to nothing, or removed meanwhile
                continue
