"""Find models, objectives, optimizers and samplers by name, ours and those of installed packages.

A row maps a name to the import string of a configuration class, "package.module:Class". The class
says by `builds`, another import string, what is built from it, so choosing and checking a
configuration imports no torch. Another package adds a row of its own by an entry point:

    [project.entry-points."wm_train.models"]
    my_model = "my_lab.model:MyModelConfig"

A name of ours stays ours; one that two packages add is refused when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

TABLES: dict[str, dict[str, str]] = {
    "models": {
        "sana_wm": "wm_train.models.sana_wm.config:SanaWMConfig",
        "waypoint": "wm_train.models.waypoint.config:WaypointConfig",
        "wan": "wm_train.models.wan.config:WanConfig",
        "experts": "wm_train.models.experts.config:ExpertsConfig",
    },
    "objectives": {
        "flow_matching": "wm_train.objectives.config:FlowMatchingConfig",
        "chunk_mixture": "wm_train.objectives.config:ChunkMixtureConfig",
        "ode_regression": "wm_train.objectives.config:OdeRegressionConfig",
        "distribution_matching": "wm_train.objectives.config:DistributionMatchingConfig",
        "ar_flow_matching": "wm_train.objectives.config:ArFlowMatchingConfig",
        "diffusion_forcing": "wm_train.objectives.forcing_config:DiffusionForcingConfig",
    },
    "optimizers": {
        "adamw": "wm_train.optim.config:AdamWConfig",
        "normuon": "wm_train.optim.config:NorMuonConfig",
    },
    "samplers": {
        "euler": "wm_train.sampling.config:EulerConfig",
        "renoise": "wm_train.sampling.config:RenoiseConfig",
        "stream": "wm_train.sampling.config:StreamConfig",
        "windows": "wm_train.sampling.config:WindowsConfig",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Return the names of one kind ("models", ...): ours in order, then those of other packages."""
    others = sorted(set(_added(kind)) - set(TABLES[kind]))
    return (*TABLES[kind], *others)


@cache
def config_class(kind: str, name: str) -> type:
    """Return the configuration class of a name.

    Raises KeyError for a name that nobody has added; RowError for one that two packages add, or
    whose row leads to no configuration of this kind.
    """
    own = TABLES[kind].get(name)
    rows = (own,) if own else _added(kind)[name]
    if len(rows) > 1:
        raise RowError(f"{name!r}, which is {' and '.join(rows)}")
    found = load(rows[0])
    if getattr(found, "kind", None) != kind:
        raise RowError(f"{name!r}, whose row {rows[0]} is no configuration of wm_train.{kind}")
    row: type = found
    return row


def default(kind: str) -> Any:
    """Return the configuration of a kind's first row, as it is without any key."""
    return config_class(kind, names(kind)[0])()


def builder(config: Any) -> Callable[..., Any]:
    """Return the function or class that `config.builds` names. Raises RowError where it is not
    there."""
    function: Callable[..., Any] = load(config.builds)
    return function


def load(path: str) -> Any:
    """Import "package.module:name". Raises RowError where there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RowError(f"{path}, which cannot be imported ({error})") from error


def leads_nowhere(path: str) -> bool:
    """Return whether the module of "package.module:name" is missing, without importing it."""
    try:
        return find_spec(path.partition(":")[0]) is None
    except ImportError:  # its package is missing
        return True


class RowError(ValueError):
    """Report a name that has a row and cannot be used; the text says what the row points to."""


@cache
def _added(kind: str) -> dict[str, tuple[str, ...]]:
    """Return name -> where its rows lead, of all installed packages."""
    found: dict[str, tuple[str, ...]] = {}
    for point in entry_points(group=f"wm_train.{kind}"):
        found[point.name] = tuple(sorted({*found.get(point.name, ()), point.value}))
    return found
