"""End a game engine together with the process that started it, however that ends.

The engine is a process of its own: it ignores SIGTERM, and after a SIGKILL of its parent it would
run, and hold the terminal, for ever. So a second small process waits until its standard input is
closed, as happens when the parent dies in any way; then it kills the engine, which is recognised by
the folder of its settings, and removes what it leaves behind. Run as a program, it imports nothing
but the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
INSTANCE = (
    b"+viz_instance_id"  # of the engine's command line; its shared memory has it in its names
)


@contextmanager
def leashed(folder: str) -> Iterator[None]:
    """Kill every process that has `folder` in its command line when the block is left or this
    process dies; the folder is removed then."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to our group or terminal must not reach it
    )
    try:
        yield
    finally:
        assert watcher.stdin is not None, "it is a pipe"
        watcher.stdin.close()
        watcher.wait()


def clean_up(folder: str) -> None:
    """Kill the processes that have `folder` in their command lines, and remove what they leave."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if process.name == str(os.getpid()) or not any(
                word.startswith(f"{folder}/".encode()) for word in words
            ):
                continue
            os.kill(int(process.name), signal.SIGKILL)
            if INSTANCE in words:
                name = words[words.index(INSTANCE) + 1].decode()
                for left in SHARED_MEMORY.glob(f"ViZDoom*{name}"):
                    left.unlink()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # until the other end is closed
    clean_up(sys.argv[1])
