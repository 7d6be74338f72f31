"""Hold a stage's folder for a driver that starts later: `python -m wm_train.resilience.hold X`.

The command that gave a job to a queueing system has ended when the job runs, and the job's driver
knows nothing of runs. This process holds `command.json` in its place, so that between two attempts
no other command takes the folder. It prints a line once it holds it, and gives it up on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

from wm_train.console import complain
from wm_train.errors import DONE, USER_ERROR
from wm_train.resilience.run_lock import COMMAND, NAME, OwnedError, check_free, owned

# the command that submitted the job, or the job's last life, may still be ending
WAIT_S, LOOK_S = 30.0, 0.5


def main(arguments: list[str]) -> int:
    """Hold the folder until asked to stop; return the exit code."""
    folder, stop = Path(arguments[0]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    until = time.monotonic() + WAIT_S
    while True:
        try:
            with owned(folder, COMMAND):
                check_free(folder, NAME)
                print("held", flush=True)
                stop.wait()
            return DONE
        except OwnedError as error:
            if time.monotonic() > until or stop.is_set():
                complain(str(error))
                return USER_ERROR
        except OSError as error:
            complain(f"run folder: got {error}, expected one that can be written. Fix: its disk")
            return USER_ERROR
        stop.wait(LOOK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
