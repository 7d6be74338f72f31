"""Declare the rule of a value beside its key: `lr: Annotated[float, Rule(...)]`.

Types say number, text or list; a `Rule` says the rest (finite, positive, one of these). Rules of
several keys at once stand in a method `problems()` of the section.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from wm_train.config.problems import Problem

MOST = 10**9  # beyond any run; catches a slipped exponent


@dataclass(frozen=True)
class Rule:
    """Hold a condition on one value, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def from_to(low: int, high: int = MOST) -> Rule:
    """Return the rule of whole numbers between two bounds, both included."""
    return Rule(lambda value: low <= value <= high, f"a whole number from {low} to {high:,}")


def one_of(*choices: str) -> Rule:
    """Return the rule of a closed list of names."""
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


Count = Annotated[int, from_to(1)]
CountOrZero = Annotated[int, from_to(0)]
MOST_S = 10**7  # four months: beyond any wait, and below what clocks and locks overflow at
Seconds = Annotated[
    float, Rule(lambda value: 0 < value <= MOST_S, f"seconds above 0, at most {MOST_S:,}")
]
Gigabytes = Annotated[
    float, Rule(lambda value: 0 < value <= 10**6, "a number above 0, at most 1,000,000")
]
Few = Annotated[int, from_to(1, 256)]  # things that each take memory at the same time
Positive = Annotated[float, Rule(lambda value: 0 < value < math.inf, "a finite number above 0")]
Finite = Annotated[float, Rule(math.isfinite, "a finite number")]
AtLeastZero = Annotated[float, Rule(lambda value: 0 <= value < math.inf, "0 or more")]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a share from 0 to 1")]
NoiseLevel = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a noise level from 0 to 1")]
Below1 = Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and less than 1")]
Factor = Annotated[
    float, Rule(lambda value: value == 0 or 1 < value < math.inf, "0 (off) or more than 1")
]


def broken_rules(section: Any) -> Iterator[Problem]:
    """Yield the problems of a dataclass and of those inside it, with keys relative to it.

    First the rules of single keys, then, where these hold, the section's own `problems()`.
    """
    hints = typing.get_type_hints(type(section), include_extras=True)
    sound = True
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        for problem in _broken(hints[field.name], value, field.name):
            sound = False
            yield problem
    if sound and hasattr(section, "problems"):
        yield from section.problems()


def _broken(kind: Any, value: Any, key: str) -> Iterator[Problem]:
    """Yield the problems of one value of type `kind`; None passes, as its type allows it."""
    if value is None:
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (problem.under(f"{key}.") for problem in broken_rules(value))
    elif isinstance(value, Mapping):
        inner = typing.get_args(typing.get_args(kind)[0] if _annotated(kind) else kind)
        for name, item in value.items():
            yield from _broken(inner[1] if inner else Any, item, f"{key}.{name}")
    if _annotated(kind):
        for rule in typing.get_args(kind)[1:]:
            if isinstance(rule, Rule) and not rule.holds(value):
                yield Problem(key, repr(value), rule.words)
    else:
        for part in typing.get_args(kind):  # int | None with a rule on its int
            if _annotated(part) and not isinstance(value, Mapping | tuple):
                yield from _broken(part, value, key)


def _annotated(kind: Any) -> bool:
    return typing.get_origin(kind) is Annotated
