"""Describe mistakes of a configuration, and report all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wm_train.config.schema import RunConfig

COMMAND = "python -m wm_train.launch"
AT = "{at}"  # stands in `rule` and `fix` for the section's own prefix: "{at}width=96"
OWN = "{own}"  # the same, but of the one stage even where the section is the whole run's


@dataclass(frozen=True)
class Problem:
    """Describe one mistake: the key, its value, the rule it breaks, and the fix."""

    where: str
    got: str
    rule: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Keep every part on one line that commands no terminal: values come from files, too."""
        for name in ("where", "got", "rule", "fix"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        fix = f". Fix: {self.fix}" if self.fix else ""
        return f"{self.where}: got {self.got}, expected {self.rule}{fix}"

    def under(self, prefix: str) -> Problem:
        """Return the problem of a section as one of the whole run; `prefix` such as "model."."""
        rule, fix = self.rule.replace(AT, prefix), self.fix.replace(AT, prefix)
        return replace(self, where=prefix + self.where, rule=rule, fix=fix)


class ConfigError(ValueError):
    """Raise all problems of one configuration; `str()` is the report for the user.

    `rest`: the configuration without its unknown keys, if these are all the problems so far:
    its values can still be checked.
    """

    def __init__(self, problems: Iterable[Problem], rest: RunConfig | None = None) -> None:
        self.problems = tuple(problems)
        self.rest = rest
        super().__init__(report(self.problems))


def one_line(text: str) -> str:
    """Replace characters that end a line or command a terminal by their escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def report(problems: Iterable[Problem]) -> str:
    """Return one report of all problems, two lines each."""
    listed = list(problems)
    plural = "s" if len(listed) != 1 else ""
    lines = [f"{len(listed)} problem{plural} in the configuration; nothing was started."]
    for number, problem in enumerate(listed, 1):
        lines.append(f"  {number}. {problem.where}: got {problem.got}, expected {problem.rule}")
        if problem.fix:
            lines.append(f"     Fix: {problem.fix}")
    return "\n".join(lines)
