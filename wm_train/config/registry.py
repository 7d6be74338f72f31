"""Find models, objectives, optimizers and samplers by name, ours and those of installed packages.

A row maps a name to the import string of a configuration class, "package.module:Class". The class
says by `builds`, another import string, what is built from it, so choosing and checking a
configuration imports no torch. Another package adds a row of its own by an entry point:

    [project.entry-points."wm_train.models"]
    my_model = "my_lab.model:MyModelConfig"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

TABLES: dict[str, dict[str, str]] = {
    "models": {"sana_wm": "wm_train.models.sana_wm.config:SanaWMConfig"},
    "objectives": {
        "flow_matching": "wm_train.objectives.config:FlowMatchingConfig",
        "chunk_mixture": "wm_train.objectives.config:ChunkMixtureConfig",
    },
    "optimizers": {
        "adamw": "wm_train.optim.config:AdamWConfig",
        "normuon": "wm_train.optim.config:NorMuonConfig",
    },
    "samplers": {
        "euler": "wm_train.sampling.config:EulerConfig",
        "stream": "wm_train.sampling.config:StreamConfig",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Return the names of one kind ("models", ...): ours in order, then those of other packages."""
    others = sorted(set(_added(kind)) - set(TABLES[kind]))
    return (*TABLES[kind], *others)


@cache
def config_class(kind: str, name: str) -> type:
    """Return the configuration class of a name. Raises KeyError for an unknown name, ImportError or
    AttributeError when another package's row cannot be imported."""
    chosen: type = load(TABLES[kind].get(name) or _added(kind)[name])
    return chosen


def default(kind: str) -> Any:
    """Return the configuration of a kind's first row, as it is without any key."""
    return config_class(kind, names(kind)[0])()


def builder(config: Any) -> Callable[..., Any]:
    """Return the function or class that `config.builds` names."""
    function: Callable[..., Any] = load(config.builds)
    return function


def load(path: str) -> Any:
    """Import "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@cache
def _added(kind: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"wm_train.{kind}")}
