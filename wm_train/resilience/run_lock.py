"""One run per folder: `owner.json` in a stage's folder says which process writes there, and is
rewritten every second while it lives.

A second run is refused and told whose folder it is. A dead owner is succeeded: at once when its
process is gone from this machine, or when it has been silent for STALE_S as seen from another. So a
restart by a launcher never waits on one machine. Nothing but exclusive creation and rename is asked
of the file system, and no clocks are compared. An owner that was thought dead and wakes up ends
itself.
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
LOST = 2  # exit code of an owner that lost its folder: a restart would only meet the new one


class OwnedError(ValueError):
    """The folder belongs to a run that lives."""


@dataclass(frozen=True)
class Owner:
    """Who writes in a folder. `machine` tells whether `pid` means anything here; `born` tells a
    process from a later one of that number."""

    token: str
    host: str
    pid: int
    machine: str
    born: str
    beat: int = 0


def this_process() -> Owner:
    token = secrets.token_hex(8)
    try:
        machine = (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
        born = born_at(os.getpid())
    except OSError:  # no such facts here: only the beat will tell
        machine, born = token, ""
    return Owner(token, socket.gethostname(), os.getpid(), machine, born)


def born_at(pid: int) -> str:
    """When a process started, in ticks since boot; empty for one that is gone or a zombie."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def read_owner(folder: Path) -> Owner | None:
    """What `owner.json` says; None: there is none. A file without a whole sentence is an owner of
    no machine."""
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return Owner("unfinished", "unknown", 0, "", "")


def lives(folder: Path, owner: Owner, me: Owner) -> bool:
    """Whether the owner of `folder` is alive; takes up to STALE_S when it is on another machine."""
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
    """Errors: OwnedError when a run that lives owns `folder`. Changes nothing."""
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
    """Own `folder` while inside.

    Errors: OwnedError when somebody else who lives does, or takes it at the same moment.
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
    """Become the owner; returns the open file, which stays ours whatever others put in its
    place."""
    path = folder / NAME
    with contextlib.suppress(FileExistsError):
        return _create(path, _text(me))
    before = read_owner(folder)
    if before is not None and lives(folder, before, me):
        raise _refusal(folder, before)
    # Two successors of one dead owner: whoever makes its claim first replaces it, if it is still
    # the same one then.
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
        except OSError:  # a file system that stutters; silence is what others will see
            continue


@contextlib.contextmanager
def only_run(folder: Path, world: World) -> Iterator[None]:
    """Rank 0 owns `folder` for all processes while inside. Errors: OwnedError on all of them."""
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
