"""Locate checkpoints: in a local folder (a Path), or under a prefix of any store that fsspec
supports (s3://, gs://, memory://).

A store has no rename and no folders of its own; what is written appears whole when it is closed, so
a checkpoint counts from the moment its manifest, which goes last, is there.
"""

from __future__ import annotations

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
    from wm_train.remote import Remote

    # others write to the store, so what was listed before is out of date
    return Remote(address, use_listings_cache=False)
