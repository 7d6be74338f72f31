"""Show how many clips a command has done."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")


def terminal() -> Console:
    """Return the console for what commands the terminal on purpose, bars and tables: text that is
    printed otherwise is escaped (`arguments.run`)."""
    from rich.console import Console

    return Console(file=getattr(sys.stdout, "raw", None))


def track(items: Iterable[Item], title: str) -> Iterable[Item]:
    """Yield the items behind a bar."""
    from rich import progress

    return progress.track(items, title, console=terminal())


def clip_progress(title: str) -> Progress:
    """Return a bar of clips with the time taken and the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("clips"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=terminal(),
    )
