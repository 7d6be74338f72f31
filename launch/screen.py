"""Print without depending on who reads: output that fails is dropped, and the work goes on.

A terminal may be closed, `| head` may have read enough, the disk below `> log` may be full. None of
that may end a run of days, whose lines are in its log files in any case.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from launch.spec import NO_STORAGE

# for commands that go on
LOST_OUTPUT = "output: got {error}; the run goes on, its lines are in the logs of its folder"


class Screen(io.TextIOBase):
    """Pass text on to a stream, and drop what it does not take.

    lost: the first error, None while all is well. note: said once on `aside` when that happens.
    """

    def __init__(self, out: TextIO, aside: Screen | None = None) -> None:
        self.lost: Exception | None = None
        self.note = ""
        self._out, self._aside = out, aside

    def write(self, text: str) -> int:
        """Write text; letters that the stream's encoding does not have are shown as escapes."""
        try:
            try:
                self._out.write(text)
            except UnicodeEncodeError as error:
                known = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._out.write(known)
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Send what is buffered, or drop it."""
        try:
            self._out.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        first, self.lost = self.lost is None, self.lost or error
        # the rest in the stream's buffer would fail again, also when the interpreter ends
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as opened:
            file, null = self._out.fileno(), os.open(os.devnull, os.O_WRONLY)
            opened.callback(os.close, null)
            kept = os.dup(file)
            opened.callback(os.close, kept)
            os.dup2(null, file)
            opened.callback(os.dup2, kept, file)
            self._out.flush()
        if first and self.note and self._aside is not None:
            print(self.note.format(error=error), file=self._aside, flush=True)

    def isatty(self) -> bool:
        """Return True for a terminal that is still there."""
        try:
            return self._out.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self._out.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the stream's encoding."""
        return self._out.encoding


@contextlib.contextmanager
def safe_output() -> Iterator[Screen]:
    """Replace stdout and stderr by Screens while inside; yield that of stdout."""
    before = sys.stdout, sys.stderr
    plain = [_opened(number, stream) for number, stream in enumerate((sys.stdin, *before))]
    errors = Screen(plain[2])
    output = Screen(plain[1], errors)
    sys.stdout, sys.stderr = output, errors  # type: ignore[assignment]
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def _opened(number: int, stream: TextIO | None) -> TextIO:
    """Return a standard stream, or one to nowhere where it was closed (`>&-`).

    The next file to be opened would otherwise get its number, and what libraries print.
    """
    if stream is not None:
        return stream
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:  # 0 to 2 may be taken by another file by now: leave them
        os.close(null)
        return io.StringIO()
    return open(number, "w" if number else "r", closefd=False)


def print_result(command: Callable[[], int]) -> int:
    """Run a command whose output is its result; return its exit code.

    A reader that has seen enough (`| head`) is no failure; output that could not be written is.
    """
    with safe_output() as output:
        code = command()
        output.flush()
        if output.lost is None or isinstance(output.lost, BrokenPipeError):
            return code
        print(f"output: got {output.lost}, expected to write it. Fix: make room", file=sys.stderr)
    return code or NO_STORAGE
