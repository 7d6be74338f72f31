"""Refuse YAML files of the user's that would grow beyond measure when they are read.

An alias stands for everything behind its anchor, so aliases of aliases multiply: a file of one
kilobyte can hold a billion values.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wm_train.config.problems import Problem

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000  # the whole configuration has some hundred


def yaml_problems(folder: Path) -> Iterator[Problem]:
    """Yield the files of a folder, and of its groups, that are too large to be a configuration."""
    import yaml

    key = "--config-dir"
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        try:
            size, mode = file.stat().st_size, file.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                yield Problem(key, f"{file}, a pipe or a device", "a file", f"rm {file}")
                continue
            if size > MOST_BYTES:
                got, rule = f"{file} of {size:,} bytes", f"at most {MOST_BYTES:,}"
                yield Problem(key, got, rule, "give the files of this run only")
                continue
            root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            if _values(root, {}) > MOST_VALUES:
                got = f"{file}, whose aliases make more than {MOST_VALUES:,} values of it"
                yield Problem(key, got, "fewer", "write out what its aliases stand for")
        except RecursionError:
            yield Problem(key, f"{file}, nested too deeply", "mappings of some levels", "mend it")
        except (OSError, ValueError, yaml.YAMLError):
            continue  # composing reads it next, and reports it


def _values(node: Any, known: dict[int, int]) -> int:
    """Return the number of values below a node, those behind aliases counted at each of them."""
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # what stands while it is counted: an alias to itself
        pairs = [item if isinstance(item, tuple) else (item,) for item in node.value]
        known[id(node)] = 1 + sum(_values(part, known) for pair in pairs for part in pair)
    return known[id(node)]
