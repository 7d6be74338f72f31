"""Write heartbeats, and find the ranks that stopped writing when others wait in vain.

Each process has a thread that rewrites a small file every second with the current step and section.
A process that is stopped, dead or stuck in the kernel stops writing; one that merely waits for it
continues. So when a collective times out, the survivors can name the stopped rank and its last
section. Ages are measured by the file system's clock, the same for all nodes. A process that died
on this machine is detected at once.
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
from wm_train.storage import read_regular

INTERVAL_S = 1.0
SILENT_AFTER_S = 3 * INTERVAL_S
LENGTH = 256  # bytes of a record, padded


class Heartbeat:
    """Write this process's heartbeat; use as a context manager.

    Set `step` and `section` as the work proceeds.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.section = 0, "start"
        self._me = this_process()
        self._file = os.open(folder / f"rank_{rank:05d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, section: str) -> None:
        """Set the current step and section."""
        self.step, self.section = step, section

    def _beat(self) -> None:
        while True:
            # One write of fixed length in place: a process that is stopped never leaves a partial
            # record. A full disk must not end the run, so errors are ignored.
            with contextlib.suppress(OSError):
                os.pwrite(self._file, self._record(), 0)
            if self._ended.wait(INTERVAL_S):
                return

    def _record(self) -> bytes:
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
    """Return `silent_ranks` after a collective has failed.

    It waits until a stopped rank has been silent long enough to be distinguished from the others.
    """
    until = time.monotonic() + SILENT_AFTER_S + INTERVAL_S
    while not (lines := silent_ranks(folder, size)) and time.monotonic() < until:
        time.sleep(INTERVAL_S / 10)
    return lines


def silent_ranks(folder: Path, size: int, after_s: float = SILENT_AFTER_S) -> list[str]:
    """Return a line for each of `size` processes that is dead, or silent for `after_s`.

    The longest silent comes first; each line gives its last step and section.
    """
    files = {rank: folder / f"rank_{rank:05d}.json" for rank in range(size)}
    written = {rank: path.stat().st_mtime for rank, path in files.items() if path.exists()}
    if not written:
        return []
    now, lines = max(written.values()), []  # a running process has just written
    for rank in sorted(files, key=lambda rank: written.get(rank, 0.0)):
        if rank not in written:
            lines.append(f"rank {rank} never started its work")
            continue
        record = _last_record(files[rank])
        if is_dead(record):
            lines.append(f"rank {rank} is dead (process {record['pid']}){_where(record)}")
        elif now - written[rank] > after_s:
            lines.append(
                f"rank {rank} has been silent for {now - written[rank]:.0f} s{_where(record)}"
            )
    return lines


def is_dead(record: dict[str, Any]) -> bool:
    """Return True if the process of this record ran on this machine and has ended."""
    return (
        bool(record.get("born"))
        and record.get("machine") == this_process().machine
        and born_at(int(record["pid"])) != record["born"]
    )


def _last_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_regular(path))
    except (OSError, ValueError):  # it died before its first record
        return {}
    return record if isinstance(record, dict) else {}


def _where(record: dict[str, Any]) -> str:
    return (
        f", last seen in step {record['step']}, section {record['section']}"
        if {"step", "section"} <= record.keys()
        else ""
    )
