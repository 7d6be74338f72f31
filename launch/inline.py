"""Run one worker as a child of this process, for debugging, without restarts.

The worker gets the terminal's input, so `breakpoint()` works.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import socket
import subprocess
from collections.abc import Iterator

from launch.leash import leashed
from launch.progress import ProgressView
from launch.signals import caught, held_back
from launch.signed import PROGRESS
from launch.spec import INTERRUPTED, PREEMPTED, LaunchSpec, fill, rank_environment

# above Ray's worker ports, below the range that systems use for outgoing connections
PORTS = range(20000, 32768)
DRAWS = 100


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Run one worker to its end; return its exit code, 128 + n if signal n ended it or us.

    Raises ValueError for more than one worker.
    """
    if spec.workers != 1:
        raise ValueError(
            f"inline launcher: got {spec.workers} workers, expected 1. Fix: launcher.workers=1, or"
            " launcher=ray"
        )
    environment = rank_environment(0, 1, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
    with caught() as stop:
        # A terminal sends its signals to the worker, too, as it is in our process group; what
        # `kill` sends reaches only us. So the worker gets none of them, and our SIGTERM for each.
        with held_back(signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            process = subprocess.Popen(
                leashed(fill(spec.command, str(spec.config_path))),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment, **environment},
                cwd=spec.directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        told = False
        try:
            for text in _output(process):
                if text.endswith("\n"):
                    view.feed(text[:-1])
                elif text:
                    view.partial(text)
                if stop.number is not None and not told:
                    process.terminate()
                    told = True
            code = process.wait()
        finally:
            process.kill()
    if stop.number is not None and code in (0, PREEMPTED, -stop.number, -signal.SIGTERM):
        view.text(f"stopped by signal {stop.number}")
        return INTERRUPTED + stop.number
    return code if code >= 0 else INTERRUPTED - code


def free_port(address: str) -> int:
    """Return a port that is free right now. Raises OSError for an address of another machine.

    The caller binds it seconds later, so it is drawn at random outside the range from which the
    system assigns ports: two launchers at the same time rarely draw the same one.
    """
    drawn = secrets.SystemRandom().sample(PORTS, DRAWS)
    for left, port in zip(reversed(range(DRAWS)), drawn):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                if not left:
                    raise
                continue
        return port
    raise AssertionError("the last draw raises or returns")


def _output(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield whole lines with their newline, and "" when nothing arrived for a while.

    A prompt that waits for input is yielded without a newline.
    """
    assert process.stdout is not None
    source, pending = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            if selector.select(0.2):
                new = os.read(source, 65536)
                if not new:
                    break
                *lines, pending = (pending + new).split(b"\n")
                yield from (line.decode(errors="replace") + "\n" for line in lines)
                continue
            half_a_line = f"@{PROGRESS} ".encode() in pending
            prompt = b"" if half_a_line else pending
            pending = pending[len(prompt) :]
            yield prompt.decode(errors="replace")
            if process.poll() is not None:  # a grandchild may hold the pipe open for ever
                break
    if pending:
        yield pending.decode(errors="replace") + "\n"
