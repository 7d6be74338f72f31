"""Signs of life: who is silent when the others wait in vain (design §9).

Each process has a thread that rewrites a small file every second with the step and the section it is in. A process that is stopped, dead or
stuck in the kernel stops writing; one that merely waits for it goes on. So when a collective times out, the survivors can name the culprit
and what it did last. Ages are measured by the file system's clock, the same for all nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

INTERVAL_S = 1.0
SILENT_AFTER_S = 3 * INTERVAL_S
LENGTH = 128  # bytes of a sign of life, padded


class Heartbeat:
    """This process's sign of life; use as a context manager. Set `step` and `section` as the work goes on."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.section = 0, "start"
        self._file = os.open(folder / f"rank_{rank:05d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, section: str) -> None:
        """The work has come to this section of this step."""
        self.step, self.section = step, section

    def _beat(self) -> None:
        while True:
            # One write of one length in place: a process that is stopped in between never leaves half a sentence.
            with contextlib.suppress(OSError):  # a full disk ends no run; silence is what others will see
                os.pwrite(self._file, json.dumps({"step": self.step, "section": self.section}).ljust(LENGTH).encode(), 0)
            if self._ended.wait(INTERVAL_S):
                return

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._file)


def silent_ranks(folder: Path, size: int) -> list[str]:
    """Which of `size` processes gave no sign of life lately, the longest silent first, with where they were."""
    files = {rank: folder / f"rank_{rank:05d}.json" for rank in range(size)}
    written = {rank: path.stat().st_mtime for rank, path in files.items() if path.exists()}
    if not written:
        return []
    now, lines = max(written.values()), []  # a process that lives has just written
    for rank in sorted(files, key=lambda rank: written.get(rank, 0.0)):
        if rank not in written:
            lines.append(f"rank {rank} never started its work")
        elif now - written[rank] > SILENT_AFTER_S:
            lines.append(f"rank {rank} has been silent for {now - written[rank]:.0f} s{_last_words(files[rank])}")
    return lines


def _last_words(path: Path) -> str:
    try:
        said = json.loads(path.read_text())
        return f", last seen in step {said['step']}, section {said['section']}"
    except (ValueError, KeyError, TypeError):  # it died before its first words
        return ""
