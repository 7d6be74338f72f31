"""Run a worker process on this machine in its own process group, with a log file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from launch.leash import leashed
from launch.signed import VARIABLE, parse, without
from launch.spec import TAIL

# without waiting for a reader where a pipe has the log's name
MODE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
MOST_LINES = 5000  # kept if nobody reads them; a worker never waits for a reader


class LogFile:
    """Write lines to a file, and drop those that it does not take.

    The thread that writes also empties the worker's pipe, so it must neither end nor wait: a full
    disk costs lines of the log, not the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._missing = 0  # lines since the last one that was written
        self._torn = False  # the last one was cut in the middle
        with contextlib.suppress(OSError):  # said with the first line that is lost
            self._put(b"")

    def write(self, line: str) -> str:
        """Add a line; return the news for a person when writing begins or ceases to fail."""
        text = line + "\n"
        if self._missing:
            gap = f"({self._missing} lines are missing here: they could not be written)\n"
            text = "\n" * self._torn + gap + text
        try:
            self._put(text.encode(errors="replace"))
        except OSError as error:
            self._missing += 1
            reason = f"log {self.path} cannot be written ({error}); its lines are dropped until it"
            return "" if self._missing > 1 else f"{reason} can. Fix: make room"
        missing, self._missing, self._torn = self._missing, 0, False
        return f"log {self.path} is written again; {missing} lines are missing" if missing else ""

    def _put(self, data: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, MODE, 0o644)
        while data:
            data = data[os.write(self._file, data) :]
            self._torn = bool(data)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Child:
    """Run `command` as a process. Create it from the main thread (see leash.py)."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        directory: Path | None,
        log: Path | None,
    ) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._news = threading.Event()
        self._token = environment.get(VARIABLE, "")
        self._log = LogFile(log) if log is not None else None
        self.process = subprocess.Popen(
            leashed(command),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            cwd=directory if directory and directory.is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            line = line.rstrip("\n")
            self._lines.append(line)
            text, figures = parse(line, self._token)
            if text or figures is None:
                self.tail.append(text)
            logged = without(line, self._token)
            if self._log is not None and (news := self._log.write(logged)):
                self._lines.append(news)
            self._news.set()
        self.process.wait()
        if self._log is not None:
            self._log.close()
        self._news.set()

    def wait(self, seconds: float, for_lines: bool) -> tuple[list[str], int | None]:
        """Return new lines and the exit code as soon as there is either, or after `seconds`.

        Without `for_lines` only the exit counts.
        """
        if for_lines:
            self._news.wait(seconds)
            self._news.clear()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        code = self.process.poll()
        if (
            code is not None
            # The last lines say why a worker died. A grandchild may hold the pipe open for ever,
            # hence the limit.
        ):
            self._reader.join(1.0)
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return lines, code

    def signal(self, number: int) -> None:
        """Send a signal to the worker and everything it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def stop(self, grace_s: float) -> int:
        """Send SIGTERM, then after `grace_s` SIGKILL, to the whole group; return the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
        self.signal(signal.SIGKILL)  # what the worker left behind
        return self.process.wait()
