"""Lock a prefix of an object store, so that only one run saves there.

As in `run_lock.py`, an `owner.json` names the process that holds the lock and is written anew while
it lives. A store has neither exclusive creation nor rename: whoever finds nobody alive writes its
own name, waits, and holds the lock if that is still what stands there. A process that finds another
name later ends itself. So of two that start at once at most one goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from wm_train.console import complain
from wm_train.resilience.run_lock import (
    LOST,
    NAME,
    OwnedError,
    Owner,
    born_at,
    parse_owner,
    this_process,
)
from wm_train.storage import Remote

BEAT_S = 10.0  # a request each
STALE_S = 45.0
SETTLE_S = 1.0  # in which the last of several that start at once has written


@contextlib.contextmanager
def owned_in_store(folder: Remote) -> Iterator[Owner]:
    """Hold the lock of `folder` while inside.

    Raises OwnedError when another running process holds it, or takes it at the same moment, and
    OSError when the store does not answer.
    """
    me = this_process()
    before = read_stored(folder)
    if before is not None and _lives(folder, before, me):
        raise _refusal(folder, before)
    _write(folder, me)
    time.sleep(SETTLE_S)
    now = read_stored(folder)
    if now is None or now.token != me.token:
        raise _refusal(folder, now or me)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(folder, me, ended), name="place", daemon=True)
    thread.start()
    try:
        yield me
    finally:
        ended.set()
        thread.join(BEAT_S)  # a store that does not answer: the lock goes stale by itself
        with contextlib.suppress(OSError):
            there = read_stored(folder)
            if there is not None and there.token == me.token:
                (folder / NAME).unlink()


def read_stored(folder: Remote) -> Owner | None:
    """Return the lock's holder, None without a lock."""
    try:
        text = (folder / NAME).read_text(errors="replace")
    except FileNotFoundError:
        return None
    return parse_owner(text)


def check_stored_free(folder: Remote) -> None:
    """Raise OwnedError when a running process holds `folder`; change nothing."""
    owner = read_stored(folder)
    if owner is not None and _lives(folder, owner, this_process()):
        raise _refusal(folder, owner)


def _lives(folder: Remote, owner: Owner, me: Owner) -> bool:
    if owner.machine == me.machine:
        return bool(owner.born) and born_at(owner.pid) == owner.born
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        now = read_stored(folder)
        if now is None:
            return False
        if now != owner:
            return True
        time.sleep(min(BEAT_S, STALE_S) / 4)
    return False


def _write(folder: Remote, owner: Owner) -> None:
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(owner)))


def _refusal(folder: Remote, owner: Owner) -> OwnedError:
    return OwnedError(
        f"checkpoints in {folder}: got a place that is owned by process {owner.pid} on"
        f" {owner.host}, expected none. Fix: wait for it or end it, or save elsewhere with another"
        " name=... or trainer.checkpoint_to=..."
    )


def _beat(folder: Remote, me: Owner, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_S):
        beat += 1
        try:
            there = read_stored(folder)
            if there is None or there.token != me.token:
                whose = f"process {there.pid} on {there.host}" if there else "nobody"
                complain(
                    f"checkpoints in {folder}: the place belongs to {whose} now; process {me.pid}"
                    f" on {me.host} leaves and writes no more"
                )
                os._exit(LOST)
            _write(folder, replace(me, beat=beat))
        except OSError:  # a store that fails for a while; others see a lock that is not rewritten
            continue
