"""Hold what a run writes to in one hand: its folder, and the place that it saves to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wm_train.errors import StorageError
from wm_train.resilience.run_lock import OwnedError, Owner, owned
from wm_train.resilience.store_lock import owned_in_store
from wm_train.storage import Place

if TYPE_CHECKING:
    from wm_train.world import World


@contextlib.contextmanager
def only_run(folder: Path, world: World, saves: Place | None = None) -> Iterator[None]:
    """Hold the lock of `folder` on rank 0 for all processes while inside, and that of the place
    that it saves to if this lies elsewhere.

    Raises OwnedError on all of them, StorageError for a store that does not answer.
    """
    with contextlib.ExitStack() as held:
        problem, passing = None, False
        if world.rank == 0:
            try:
                held.enter_context(owned(folder))
                if saves is not None:
                    passing = not isinstance(saves, Path)
                    held.enter_context(owned_place(saves, folder))
            except OwnedError as error:
                problem, passing = str(error), False
            except OSError as error:
                problem = str(error)
        problem, passing = world.from_first((problem, passing))
        if problem:
            raise StorageError(problem, passing=True) if passing else OwnedError(problem)
        yield


def owned_place(
    place: Place, folder: Path | None = None
) -> contextlib.AbstractContextManager[Owner | None]:
    """Return a context that holds the lock of a place for checkpoints: of the stage's folder where
    they lie in it, which `folder` says is held already, else of the place itself."""
    if not isinstance(place, Path):
        return owned_in_store(place)
    place = place.resolve()
    stage = place.parent if place.name == "checkpoints" else place
    if folder is not None and stage == folder.resolve():
        return contextlib.nullcontext()
    return owned(stage)
