"""Run one worker process inside a Ray actor on the worker's node; the driver makes short calls."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ray

from launch.child import Child
from launch.inline import free_port
from launch.spec import LaunchSpec, fill

# suffix of every vendor's variable that selects a process's devices
VISIBLE = "_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Seat:
    """Describe an actor's place. devices: variables set by Ray that select its accelerators."""

    node: str
    address: str
    devices: dict[str, str]


@dataclass(frozen=True)
class News:
    """Report new output since the last call; `code` None: still running."""

    lines: list[str]
    code: int | None
    tail: list[str]


class RankActor:
    """Run one worker process; calls are handled one at a time, so `listen` must not block long."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._copy: Path | None = None  # of the config, with its passwords

    def seat(self) -> Seat:
        devices = {
            name: value for name, value in os.environ.items() if name.endswith(VISIBLE) and value
        }
        return Seat(
            ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), devices
        )

    def port(self, address: str) -> int:
        """Return a free port on this node, for the rendezvous."""
        return free_port(address)

    def start(self, spec: LaunchSpec, environment: dict[str, str], log: str) -> int:
        """Start the worker; return its process id."""
        assert self._child is None
        config = _config_here(spec)
        self._copy = config if config != spec.config_path else None
        command = fill(spec.command, str(config))
        self._child = Child(command, {**spec.environment, **environment}, spec.directory, Path(log))
        return self._child.process.pid

    def listen(self, seconds: float, for_lines: bool) -> News:
        """Wait at most `seconds` for new output (if `for_lines`) or the end of the worker."""
        assert self._child is not None
        lines, code = self._child.wait(seconds, for_lines)
        if code is not None:
            self._clear()
        return News(
            lines if for_lines else [], code, list(self._child.tail) if code is not None else []
        )

    def stop(self, grace_s: float) -> int | None:
        """End the worker and everything it started; return its exit code."""
        code = self._child.stop(grace_s) if self._child is not None else None
        self._clear()
        return code

    def _clear(self) -> None:
        if self._copy is not None:
            self._copy.unlink(missing_ok=True)


def _config_here(spec: LaunchSpec) -> Path:
    """Return the driver's config file if this node can read it, else a local copy."""
    if (
        spec.config_path.is_file()
        and spec.config_path.read_text(encoding="utf-8") == spec.config_text
    ):
        return spec.config_path
    handle, name = tempfile.mkstemp(prefix="wm_train_", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(spec.config_text)
    return Path(name)
