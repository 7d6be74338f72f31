"""Lock a stage's folder, so that only one run writes to it.

`owner.json` in the folder names the process that holds the lock, which rewrites it every second. A
second run is refused, with the holder's name. A stale lock is taken over: at once when its process
has ended on this machine, or when a lock of another machine has not been rewritten for STALE_S. So
a restart by a launcher never waits on one machine. Only exclusive creation and rename are needed
from the file system, and no clocks are compared. A process whose lock was taken over ends itself
when it runs again.
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
from typing import TYPE_CHECKING

from wm_train.console import complain

if TYPE_CHECKING:
    from wm_train.world import World

NAME = "owner.json"
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


def read_owner(folder: Path) -> Owner | None:
    """Return the lock's holder, None without a lock file.

    A partial lock file counts as held by an unknown host.
    """
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return Owner("unfinished", "unknown", 0, "", "")


def lives(folder: Path, owner: Owner, me: Owner) -> bool:
    """Return True if the holder of `folder` is running; takes up to STALE_S for another machine."""
    if owner.machine == me.machine:
        return bool(owner.born) and born_at(owner.pid) == owner.born
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        now = read_owner(folder)
        if now is None:
            return False
        if now != owner:
            return True
        time.sleep(BEAT_S / 4)
    return False


def check_free(folder: Path) -> None:
    """Raise OwnedError when a running process holds `folder`; change nothing."""
    owner = read_owner(folder)
    if owner is not None and lives(folder, owner, this_process()):
        raise _refusal(folder, owner)


def _refusal(folder: Path, owner: Owner) -> OwnedError:
    return OwnedError(
        f"run folder {folder}: got a run that is owned by process {owner.pid} on {owner.host},"
        " expected none. Fix: wait for it or end it, or start this one with another name=... or"
        " out=..."
    )


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Owner]:
    """Hold the lock of `folder` while inside.

    Raises OwnedError when another running process holds it, or takes it at the same moment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = this_process()
    file = _take(folder, me)
    ended = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(folder, me, file, ended), name="owner", daemon=True
    )
    thread.start()
    try:
        yield me
    finally:
        ended.set()
        thread.join()
        os.close(file)
        there = read_owner(folder)
        if there is not None and there.token == me.token:
            (folder / NAME).unlink(missing_ok=True)


def _text(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).ljust(LENGTH).encode()


def _take(folder: Path, me: Owner) -> int:
    """Take the lock and return its open file, which stays ours if others replace it on disk."""
    path = folder / NAME
    with contextlib.suppress(FileExistsError):
        return _create(path, _text(me))
    before = read_owner(folder)
    if before is not None and lives(folder, before, me):
        raise _refusal(folder, before)
    # Two processes may try to take over one stale lock: the first to create the claim file wins, if
    # the lock is still the same by then.
    token = before.token if before else "gone"
    claim, draft = folder / f"{NAME}.claim-{token}", folder / f"{NAME}.tmp-{me.token}"
    try:
        os.close(_create(claim, b""))
    except FileExistsError:
        raise OwnedError(
            f"run folder {folder}: got another command that is taking it over from a dead run,"
            f" expected none. Fix: wait for it; if nothing else is being started, delete {claim}"
        ) from None
    try:
        now = read_owner(folder)
        if now is not None and now.token != token:
            raise _refusal(folder, now)
        file = _create(draft, _text(me))
        draft.replace(path)
        return file
    finally:
        claim.unlink()


def _create(path: Path, data: bytes) -> int:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(file, data)
    return file


def _beat(folder: Path, me: Owner, file: int, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_S):
        beat += 1
        try:
            there = read_owner(folder)
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


@contextlib.contextmanager
def only_run(folder: Path, world: World) -> Iterator[None]:
    """Hold the lock of `folder` on rank 0 for all processes while inside.

    Raises OwnedError on all of them.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if world.rank == 0:
            try:
                held.enter_context(owned(folder))
            except (OwnedError, OSError) as error:
                problem = str(error)
        problem = world.from_first(problem)
        if problem:
            raise OwnedError(problem)
        yield
