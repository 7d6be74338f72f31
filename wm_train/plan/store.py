"""Keep what a plan has found on disk, by a name that is a hash of everything that it depends on.

Files are plain JSON; a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wm_train.config.schema import StageConfig
from wm_train.storage import read_regular

PACKAGES = ("wm_train", "parallel", "data_shards")
# of a stage: nothing that a step's shapes depend on; `data` and `trainer` but for two of their keys
IDLE = {"index", "steps", "until_loss", "workers", "new", "reinitialise", "trajectories"}
IDLE |= {"inherit", "inherit_weights", "inherit_optimizer", "data", "trainer"}
RATES = {"lr", "warmup_steps", "schedule"}  # of an optimizer
LENGTHS = {"steps", "until_loss"}  # of a stage
UNSAID = {"seed", "tracker", "resume"}  # of a run


def folder() -> Path:
    """Return the folder of what is kept, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wm_train" / "rehearsals"


def name_of(facts: Any) -> str:
    """Return a hash of facts, of torch's version and of the source of the packages."""
    every = [facts, version("torch"), source_digest()]
    return hashlib.sha256(json.dumps(every, default=str).encode()).hexdigest()


@cache
def source_digest() -> str:
    """Return a hash of the source files of the packages that a plan runs."""
    total, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def load(path: Path) -> Any:
    """Return what is kept, None if nothing can be read."""
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError):
        return None


def keep(path: Path, data: Any) -> None:
    """Keep data as JSON."""
    draft = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(data))
        draft.replace(path)
    except OSError:  # a read-only or full home: the plan only takes longer next time
        draft.unlink(missing_ok=True)


def facts_of(config: StageConfig) -> dict[str, Any]:
    """Return what a rehearsal depends on in a stage: not how long it trains, from which weights, on
    which data, nor at which rate."""
    facts = {name: value for name, value in asdict(config).items() if name not in IDLE}
    facts |= {"pack": config.data.pack, "accumulate": config.trainer.accumulate}
    facts["roles"] = {
        role: {name: value for name, value in own.items() if not name.startswith("inherit")}
        for role, own in facts["roles"].items()
    }
    return without_rates(facts)


def without_rates(settings: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Return settings, those of the key `of`, without the rates of the optimizers in them."""
    return {
        name: without_rates(value, name) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if of != "optimizer" or name not in RATES
    }


def report_settings(settings: Mapping[str, Any], timed: bool) -> dict[str, Any]:
    """Return a run's settings without those on which the kept report of a stage does not depend;
    timed: it says how many days the stage takes."""
    left = {name: value for name, value in settings.items() if name not in UNSAID}
    if timed:
        return without_rates(left)
    stages = {
        stage: {name: value for name, value in own.items() if name not in LENGTHS}
        for stage, own in left["recipe"]["stages"].items()
    }
    return without_rates({**left, "recipe": {**left["recipe"], "stages": stages}})
