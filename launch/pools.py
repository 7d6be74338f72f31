"""Run several groups of workers under one driver: start together, restart apart, stop together."""

from __future__ import annotations

import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping

from launch.progress import ProgressView
from launch.signals import Caught, caught
from launch.spec import INTERRUPTED, LaunchSpec

LOOK_S = 0.2  # longest delay of a forwarded signal


def run_together(
    pools: Mapping[str, LaunchSpec],
    view: ProgressView,
    run: Callable[[LaunchSpec, ProgressView, Caught], int],
) -> int:
    """Call `run` for every pool, each in a thread of its own, until all have ended.

    A pool restarts by itself. When one fails for good, it is named and the others are asked to save
    and leave. Returns 0, the exit code of the first pool that failed, or 128 + signal.
    """
    stops = {name: Caught() for name in pools}
    ended: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

    def one(name: str) -> None:
        code = 1
        try:
            code = run(pools[name], view.of(name), stops[name])
        except Exception:  # otherwise the thread would end without a message
            view.of(name).text(traceback.format_exc())
        finally:
            ended.put((name, code))

    def stop_all(number: int) -> None:
        for stop in stops.values():
            stop.number = stop.number or number

    first_failure = 0
    left = set(pools)
    with caught() as asked:
        for name in pools:
            threading.Thread(target=one, args=(name,), name=f"pool {name}", daemon=True).start()
        while left:
            if asked.number is not None:
                stop_all(asked.number)
            try:
                name, code = ended.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            left.remove(name)
            if code and not first_failure and asked.number is None:
                first_failure = code
                others = f"; asking {', '.join(sorted(left))} to save and leave" if left else ""
                view.text(f"pool {name} failed with exit code {code}{others}")
                stop_all(signal.SIGTERM)
    return INTERRUPTED + asked.number if asked.number is not None else first_failure
