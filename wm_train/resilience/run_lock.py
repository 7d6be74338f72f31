"""Lock a stage's folder, so that only one run writes to it.

`owner.json` in the folder names the process that holds the lock, which rewrites it every second. A
second run is refused, with the holder's name. The workers hold it while they run (rank 0), and the
command that starts them holds `command.json` from before it writes anything until it ends: also
before the first attempt and between two of them the folder is in one hand.

A stale lock is taken over: at once when its process has ended on this machine, or when a lock of
another machine has not been rewritten for STALE_S. So a restart by a launcher never waits on one
machine. Only exclusive creation and rename are needed from the file system, and no clocks are
compared. A process whose lock was taken over ends itself when it runs again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wm_train.console import complain
from wm_train.storage import read_regular

NAME = "owner.json"  # of the workers
COMMAND = "command.json"  # of the command that starts them
BEAT_S = 1.0
STALE_S = 10.0
LENGTH = 512  # bytes of the file, padded: rewritten in one piece
LOST = 2  # exit code of a process that lost its lock: a restart could not get it back


class OwnedError(ValueError):
    """Report that a running process holds the folder's lock."""


@dataclass(frozen=True)
class Owner:
    """Identify the process that holds a lock.

    `machine` tells if `pid` is a process of this machine; `born` distinguishes a process from a
    later one with the same pid.
    """

    token: str
    host: str
    pid: int
    machine: str
    born: str
    beat: int = 0


def this_process() -> Owner:
    """Return the lock entry of this process."""
    token = secrets.token_hex(8)
    try:
        machine = (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
        born = born_at(os.getpid())
    except OSError:  # no /proc: only a lock that is no longer rewritten shows the end
        machine, born = token, ""
    return Owner(token, socket.gethostname(), os.getpid(), machine, born)


def born_at(pid: int) -> str:
    """Return the start of a process in ticks since boot; empty if it has ended or is a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def read_owner(folder: Path, name: str = NAME) -> Owner | None:
    """Return the lock's holder, None without a lock file. Raises OSError for a pipe or a device.

    A partial lock file counts as held by an unknown host.
    """
    try:
        data = read_regular(folder / name)
    except FileNotFoundError:
        return None
    return parse_owner(data.decode(errors="replace"))


def parse_owner(text: str) -> Owner:
    """Parse a lock file; anything else is a lock that an unknown host holds."""
    try:
        owner = Owner(**json.loads(text))
        # the token becomes part of a file's name, the host is shown
        if owner.token.isalnum() and owner.host.isprintable() and isinstance(owner.pid, int):
            return owner
    except (ValueError, TypeError, AttributeError):
        pass  # said below
    return Owner("unfinished", "unknown", 0, "", "")


def lives(folder: Path, owner: Owner, me: Owner, name: str = NAME) -> bool:
    """Return True if the holder of `folder` is running; takes up to STALE_S for another machine."""
    if owner.machine == me.machine:
        return bool(owner.born) and born_at(owner.pid) == owner.born
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        now = read_owner(folder, name)
        if now is None:
            return False
        if now != owner:
            return True
        time.sleep(BEAT_S / 4)
    return False


def check_free(folder: Path, *names: str) -> None:
    """Raise OwnedError when a running process holds one of the locks of `folder`; change nothing.

    names: of the locks, without any both.
    """
    me = this_process()
    for name in names or (NAME, COMMAND):
        owner = read_owner(folder, name)
        if owner is not None and lives(folder, owner, me, name):
            raise _refusal(folder, owner)


def _refusal(folder: Path, owner: Owner) -> OwnedError:
    return OwnedError(
        f"run folder {folder}: got a run that is owned by process {owner.pid} on {owner.host},"
        " expected none. Fix: wait for it or end it, or start this one with another name=... or"
        " out=..."
    )


@contextlib.contextmanager
def owned(folder: Path, name: str = NAME) -> Iterator[Owner]:
    """Hold the lock `name` of `folder` while inside.

    Raises OwnedError when another running process holds it, or takes it at the same moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = this_process()
    file = _take(folder, me, name)
    ended = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(folder, me, file, ended, name), name="owner", daemon=True
    )
    thread.start()
    try:
        yield me
    finally:
        ended.set()
        thread.join()
        os.close(file)
        _give_up(folder, me, name)


def _give_up(folder: Path, me: Owner, name: str) -> None:
    there = read_owner(folder, name)
    if there is not None and there.token == me.token:
        (folder / name).unlink(missing_ok=True)


def _text(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).ljust(LENGTH).encode()


def _take(folder: Path, me: Owner, name: str) -> int:
    """Take the lock and return its open file, which stays ours if others replace it on disk."""
    path = folder / name
    with contextlib.suppress(FileExistsError):
        return _create(path, _text(me))
    before = read_owner(folder, name)
    if before is not None and lives(folder, before, me, name):
        raise _refusal(folder, before)
    # Two processes may try to take over one stale lock: the first to hold the claim file wins, if
    # the lock is still the same by then. The claim is a lock like the other: one whose process died
    # within the take-over is itself taken over.
    token = before.token if before else "gone"
    claim, draft = f"{name}.claim-{token}", folder / f"{name}.tmp-{me.token}"
    os.close(_take(folder, me, claim))
    try:
        now = read_owner(folder, name)
        if now is not None and now.token != token:
            raise _refusal(folder, now)
        file = _create(draft, _text(me))
        mine = read_owner(folder, claim)
        if mine is None or mine.token != me.token:  # we slept, and were succeeded
            os.close(file)
            draft.unlink()
            raise _refusal(folder, mine or me)
        draft.replace(path)
        return file
    finally:
        _give_up(folder, me, claim)


def _create(path: Path, data: bytes) -> int:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(file, data)
    except OSError:  # a full disk: half a lock would keep others waiting
        os.close(file)
        path.unlink()
        raise
    return file


def _beat(folder: Path, me: Owner, file: int, ended: threading.Event, name: str = NAME) -> None:
    beat = 0
    while not ended.wait(BEAT_S):
        beat += 1
        try:
            there = read_owner(folder, name)
            if there is None or there.token != me.token:
                whose = f"process {there.pid} on {there.host}" if there else "nobody"
                complain(
                    f"run folder {folder}: it belongs to {whose} now; process {me.pid} on {me.host}"
                    " leaves and writes no more"
                )
                os._exit(LOST)
            os.pwrite(file, _text(replace(me, beat=beat)), 0)
        except (
            OSError
        ):  # a file system that fails for a while; others see a lock that is not rewritten
            continue
