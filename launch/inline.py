"""One worker as a child of this process, for debugging: the terminal's input goes to it, so
`breakpoint()` works; no restarts."""

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
from launch.signals import caught
from launch.spec import INTERRUPTED, LaunchSpec, fill, rank_environment

PORTS = range(
    20000, 32768
)  # above those that Ray gives to its workers, below those that systems give to connections
DRAWS = 100


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Run one worker to its end; returns its exit code, 128 + n if signal n ended it. Raises
    ValueError for more workers than one."""
    if spec.workers != 1:
        raise ValueError(
            f"inline launcher: got {spec.workers} workers, expected 1. Fix: launcher.workers=1, or"
            " launcher=ray"
        )
    environment = rank_environment(0, 1, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
    # A Ctrl-C reaches the worker from the terminal itself, as it is in our process group; SIGTERM
    # comes to us alone and is handed on.
    with caught() as stop:
        process = subprocess.Popen(
            leashed(fill(spec.command, str(spec.config_path))),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.environment, **environment},
            cwd=spec.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        told = False
        for text in _output(process):
            if text.endswith("\n"):
                view.feed(text[:-1])
            elif text:
                view.partial(text)
            if stop.number == signal.SIGTERM and not told:
                process.terminate()
                told = True
        code = process.wait()
    return code if code >= 0 else INTERRUPTED - code


def free_port(address: str) -> int:
    """A port nobody listens on right now. Whoever gets it binds it seconds later, so it is none
    that the system gives away meanwhile, and two launchers that ask at the same time hardly draw
    the same one. Raises OSError for an address that is not ours."""
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
    """Whole lines with their newline; a prompt that waits for input comes without one; "" when
    nothing came for a while."""
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
            prompt = b"" if pending.startswith(b"@") else pending
            pending = pending[len(prompt) :]
            yield prompt.decode(errors="replace")
            if process.poll() is not None:  # a grandchild may hold the pipe open for ever
                break
    if pending:
        yield pending.decode(errors="replace") + "\n"
