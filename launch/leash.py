"""Run a command that dies with its parent: `python leash.py <parent pid> <command...>`.

Parent pid 0 accepts any parent. A worker whose launcher was killed with SIGKILL would otherwise
continue to train, hold its devices and write into the run directory that its replacement uses. The
kernel's parent-death signal survives exec, so no extra process remains. On systems other than Linux
it only execs. It runs as a file in an isolated interpreter, so it may import nothing but the
standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def leashed(command: list[str]) -> list[str]:
    """Return the command line that runs `command` and kills it when this process dies.

    Start it from the main thread: the parent-death signal belongs to the thread that starts it.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def leashed_to_anybody(command: list[str]) -> list[str]:
    """Return the same for a command that another program will start."""
    return [sys.executable, "-I", "-S", __file__, "0", *command]


def main() -> None:
    """Ask the kernel for the parent-death signal, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if parent not in (0, os.getppid()):  # it died before the line above
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
