"""Make one phase of every worker long: put this folder on PYTHONPATH and set WM_TRAIN_SLOW.

WM_TRAIN_SLOW=<phase>:<seconds>:<folder>. The phase leaves files begun_<pid> and, where nobody
interrupts it, ended_<pid> in the folder. Python imports this file at its start.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

STEP = 5  # whose data come late
# phase -> the function that becomes slow: module, class or "", name
PLACES = {
    "start": ("wm_train.training.resume", "", "inherit"),
    "data": ("data_shards.loading.load", "ClipLoader", "make_batch"),
    "step": ("wm_train.training.step", "", "clips_of"),
    "save": ("wm_train.checkpoint.writer", "", "commit"),
    "validation": ("wm_train.evaluation.held_out", "", "clips_of"),
    "sampling": ("wm_train.sampling.guidance", "", "velocities"),
}


def slow(function, phase: str, seconds: float, folder: Path):
    """Return the function with its delay, in slices as Python's own waiting is."""

    def called(*given, **named):
        if phase != "data" or given[1] == STEP:
            (folder / f"begun_{os.getpid()}").touch()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.05)
            (folder / f"ended_{os.getpid()}").touch()
        return function(*given, **named)

    return called


class Finder(importlib.abc.MetaPathFinder):
    """Change the one module as soon as it has been imported."""

    def __init__(self, phase: str, seconds: float, folder: Path) -> None:
        self.given = (phase, seconds, folder)
        self.module, self.owner, self.name = PLACES[phase]

    def find_spec(self, name: str, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then(module: ModuleType) -> None:
            execute(module)
            holder = getattr(module, self.owner) if self.owner else module
            setattr(holder, self.name, slow(getattr(holder, self.name), *self.given))

        spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


if "WM_TRAIN_SLOW" in os.environ:
    asked, pause, where = os.environ["WM_TRAIN_SLOW"].split(":", 2)
    sys.meta_path.insert(0, Finder(asked, float(pause), Path(where)))
