"""Signs of life: who is silent when the others wait in vain (design §9).

Each process has a thread that rewrites a small file every second with the step and the section it
is in. A process that is stopped, dead or stuck in the kernel stops writing; one that merely waits
for it goes on. So when a collective times out, the survivors can name the culprit and what it did
last. Ages are measured by the file system's clock, the same for all nodes. A process that died on
this machine is known at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from wm_train.resilience.run_lock import born_at, this_process

INTERVAL_S = 1.0
SILENT_AFTER_S = 3 * INTERVAL_S
LENGTH = 256  # bytes of a sign of life, padded


class Heartbeat:
    """This process's sign of life; use as a context manager. Set `step` and `section` as the work
    goes on."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.section = 0, "start"
        self._me = this_process()
        self._file = os.open(folder / f"rank_{rank:05d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, section: str) -> None:
        """The work has come to this section of this step."""
        self.step, self.section = step, section

    def _beat(self) -> None:
        while True:
            # One write of one length in place: a process that is stopped in between never leaves
            # half a sentence.
            with contextlib.suppress(
                OSError
            ):  # a full disk ends no run; silence is what others will see
                os.pwrite(self._file, self._sentence(), 0)
            if self._ended.wait(INTERVAL_S):
                return

    def _sentence(self) -> bytes:
        who = {"pid": self._me.pid, "machine": self._me.machine, "born": self._me.born}
        return (
            json.dumps({"step": self.step, "section": self.section, **who}).ljust(LENGTH).encode()
        )

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._file)


def missing_ranks(folder: Path, size: int) -> list[str]:
    """`silent_ranks`, after a collective has failed: waits until somebody has been silent long
    enough to be told from the others."""
    until = time.monotonic() + SILENT_AFTER_S + INTERVAL_S
    while not (lines := silent_ranks(folder, size)) and time.monotonic() < until:
        time.sleep(INTERVAL_S / 10)
    return lines


def silent_ranks(folder: Path, size: int, after_s: float = SILENT_AFTER_S) -> list[str]:
    """Which of `size` processes are dead or gave no sign of life for `after_s`, the longest silent
    first, with where they were."""
    files = {rank: folder / f"rank_{rank:05d}.json" for rank in range(size)}
    written = {rank: path.stat().st_mtime for rank, path in files.items() if path.exists()}
    if not written:
        return []
    now, lines = max(written.values()), []  # a process that lives has just written
    for rank in sorted(files, key=lambda rank: written.get(rank, 0.0)):
        if rank not in written:
            lines.append(f"rank {rank} never started its work")
            continue
        said = _last_words(files[rank])
        if is_dead(said):
            lines.append(f"rank {rank} is dead (process {said['pid']}){_where(said)}")
        elif now - written[rank] > after_s:
            lines.append(
                f"rank {rank} has been silent for {now - written[rank]:.0f} s{_where(said)}"
            )
    return lines


def is_dead(said: dict[str, Any]) -> bool:
    """Whether the process of these words was on this machine and is no more."""
    return (
        bool(said.get("born"))
        and said.get("machine") == this_process().machine
        and born_at(int(said["pid"])) != said["born"]
    )


def _last_words(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):  # it died before its first words
        return {}
    return said if isinstance(said, dict) else {}


def _where(said: dict[str, Any]) -> str:
    return (
        f", last seen in step {said['step']}, section {said['section']}"
        if {"step", "section"} <= said.keys()
        else ""
    )
