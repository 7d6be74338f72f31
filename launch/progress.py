"""Show rank 0's output, with its signed lines of progress (launch.signed) as a progress bar.

Without a terminal they become a line every few seconds.
"""

from __future__ import annotations

import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from launch.signed import VARIABLE, parse, without

if TYPE_CHECKING:
    from rich.progress import Progress

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def are_figures(value: Any) -> bool:
    """Return whether a signed line holds what a bar needs."""
    return isinstance(value, dict) and all(
        type(value.get(name)) is int for name in ("step", "steps")
    )


def figures_text(figures: Mapping[str, Any]) -> str:
    """Format `loss 0.8312  340 frames/s  1:12 left`, leaving out unknown figures."""
    parts = []
    if isinstance(figures.get("loss"), int | float):
        parts.append(f"loss {figures['loss']:.4f}")
    if isinstance(figures.get("frames_per_s"), int | float):
        parts.append(f"{figures['frames_per_s']:.0f} frames/s")
    if isinstance(figures.get("eta_s"), int | float):
        parts.append(f"{duration(figures['eta_s'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds as `0:07`, `12:34` or `3:04:05`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def shown(text: str) -> str:
    """Return a worker's text as a terminal may have it: without colours, and with all else that
    would command the terminal as escapes. Of a line that a bar has written over itself, the end."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in COLOUR.sub("", text).split("\n")]
    return "\n".join(
        "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line)
        for line in lines
    )


class ProgressView:
    """Show lines as they arrive. Use it as a context, so that the bar is always removed."""

    def __init__(
        self,
        out: TextIO | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out = out if out is not None else sys.stdout
        self.every_s, self.clock = every_s, clock
        self.token = secrets.token_hex(16)  # of the progress lines that are believed
        self.last: dict[str, Any] | None = None  # figures of the newest progress line
        self._printed_at: float | None = None
        self._bar: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._lock = threading.RLock()  # views of several pools share one screen

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of workers whose progress this view shows."""
        return {VARIABLE: self.token}

    def of(self, pool: str) -> ProgressView:
        """Return a view for one of several groups of workers, whose lines carry its name."""
        return _PoolView(self, pool)

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def step(self) -> int | None:
        """Return the last step that rank 0 reported."""
        return None if self.last is None else int(self.last["step"])

    def feed(self, line: str) -> None:
        """Show one line of rank 0's output, given without its newline."""
        text, figures = parse(line, self.token)
        if not are_figures(figures):
            self.text(without(line, self.token))
            return
        if text:  # it had no newline
            self.text(text)
        self.last = figures
        if self.out.isatty():
            self._draw(figures)
            return
        now = self.clock()
        if (
            self._printed_at is None
            or now - self._printed_at >= self.every_s
            or figures["step"] >= figures["steps"]
        ):
            self._printed_at = now
            parts = (
                str(figures.get("stage", "")),
                f"step {figures['step']}/{figures['steps']}",
                figures_text(figures),
            )
            self.text("  ".join(part for part in parts if part))

    def text(self, line: str) -> None:
        """Show an ordinary line, above the bar if there is one."""
        line = shown(line)
        with self._lock:
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                print(line, file=self.out, flush=True)

    def partial(self, text: str) -> None:
        """Show text without a newline, such as a debugger's prompt, and remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}
        print(shown(without(text, self.token)), end="", file=self.out, flush=True)

    def _draw(self, figures: Mapping[str, Any]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=Console(file=self.out), refresh_per_second=4)
            self._bar.start()
        stage = shown(str(figures.get("stage", "")))
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=figures["steps"], figures="")
        self._bar.update(
            self._tasks[stage],
            completed=figures["step"],
            total=figures["steps"],
            figures=figures_text(figures),
        )


class _PoolView(ProgressView):
    """Show one pool's lines and bars with its name, and keep its own step."""

    def __init__(self, whole: ProgressView, pool: str) -> None:
        super().__init__(whole.out, whole.every_s, whole.clock)
        self.token = whole.token
        self._whole, self._pool = whole, pool

    def text(self, line: str) -> None:
        for part in line.split("\n"):
            self._whole.text(f"{self._pool} | {part}")

    def partial(self, text: str) -> None:
        self.text(text)

    def _draw(self, figures: Mapping[str, Any]) -> None:
        with self._whole._lock:
            self._whole._draw(
                {**figures, "stage": f"{self._pool} {figures.get('stage', '')}".strip()}
            )
