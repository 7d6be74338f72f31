"""Start a Ray of our own on this machine, start it again when it breaks, and clear up behind it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

from launch.progress import ProgressView
from launch.signals import held_back

STARTS = 3  # attempts
SOCKET_BYTES = 107  # of the path of a socket, by the kernel
BELOW = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
VITAL = ("raylet", "gcs_server")  # of Ray's processes, those that it cannot work without


class LocalRay:
    """Keep a Ray for the length of a run, also if several pools use it in threads of their own."""

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus
        self._lock = threading.Lock()

    def start(self, view: ProgressView) -> str:
        """Start it; return an error message, or "".

        Its processes choose their own ports. If another program takes one first, all of them start
        again.
        """
        import ray

        from launch.compat import command_line_as_utf8

        for left in reversed(range(STARTS)):
            try:
                # A terminal that goes must not take Ray along before the workers have saved.
                with held_back(signal.SIGHUP, signal.SIGQUIT), command_line_as_utf8():
                    ray.init(
                        address="local",
                        num_cpus=self._cpus,
                        include_dashboard=False,
                        dashboard_host="127.0.0.1",
                        _node_ip_address="127.0.0.1",
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
                return ""
            # there is no narrower class: Ray raises Exception itself when one of its processes has
            # died
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                ray.shutdown()
                if "AF_UNIX" in reason:
                    return _too_long()
                if left:
                    view.text(f"starting Ray: got {reason}; trying again")
        return (
            f"starting Ray: got {reason} {STARTS} times, expected a Ray on this machine. Fix: its"
            f" logs below {_temporary()}/ray, or launcher=torchrun"
        )

    def broken(self) -> str:
        """Return the names of vital processes that have ended, or ""."""
        from launch.compat import ended_parts

        return ", ".join(part for part in ended_parts() if part in VITAL)

    def mend(self, view: ProgressView) -> str:
        """Start it again if it is broken; return an error message, or ""."""
        import ray

        with self._lock:
            if not (gone := self.broken()):
                return ""
            view.text(f"Ray's own process has ended ({gone}): starting Ray again")
            ray.shutdown()
            return self.start(view)

    def end(self, keep_logs: bool) -> None:
        """Stop it, and remove what it has left on the disk."""
        import ray

        ray.shutdown()
        place = Path(_temporary(), "ray")
        # named after the process that started it, also where it did not come up
        for folder in () if keep_logs else place.glob(f"session_*_{os.getpid()}"):
            shutil.rmtree(folder, ignore_errors=True)
        latest = place / "session_latest"
        if latest.is_symlink() and not latest.exists():
            latest.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are in it
            place.rmdir()


def _temporary() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _too_long() -> str:
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    return (
        f"starting Ray: got {name}={_temporary()}, which is {len(os.fsencode(_temporary()))} bytes"
        f" long, expected at most {SOCKET_BYTES - BELOW}, as Ray's sockets lie below it and their"
        f" paths have at most {SOCKET_BYTES}. Fix: RAY_TMPDIR=/tmp"
    )
