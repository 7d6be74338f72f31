"""Run the jobs of `encode` in this process, in several processes, or as tasks of a Ray cluster.

The bytes do not depend on the choice.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_shards.encoding.job import Bad, Job, encode_in_worker
from data_shards.schema import DataError

Done = tuple[int, Bad]  # number of a job, and its clips that cannot be read


def run_in_processes(jobs: list[Job], workers: int) -> Iterator[Done]:
    """Run the jobs in a pool of processes, yielding the result of each as it finishes."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(
        min(workers, len(jobs) or 1), multiprocessing.get_context("spawn"), leave_with_parent
    ) as pool:
        futures = [pool.submit(encode_in_worker, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "workers: one was killed (out of memory?), expected all alive. Fix: run again,"
                " perhaps with fewer"
            ) from error
        except BaseException:
            for worker in multiprocessing.active_children():  # not after the shards under way
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def leave_with_parent() -> None:
    """End this worker when its parent process dies in any way.

    Otherwise a pool's workers would wait for ever. SIGTERM ends the shard under way, with its
    temporary files.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None, "called in workers only"
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def run_on_ray(jobs: list[Job], workers: int) -> Iterator[Done]:
    """Run at most `workers` tasks at a time, each on one CPU.

    A task is repeated if its worker or node dies. It joins the cluster of RAY_ADDRESS, whose nodes
    must see source and out under the same paths; without one it starts a local cluster.
    """
    # read when ray is imported, and by the processes that it starts
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {
        "num_cpus": workers,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DataError(
            f"runner: cannot join Ray at {address} ({error}), expected a cluster. Fix: unset"
            " RAY_ADDRESS"
        ) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(encode_in_worker)
        waiting = iter(jobs)
        running: list[Any] = []
        while True:
            running += [task.remote(job) for _, job in zip(range(workers - len(running)), waiting)]
            if not running:
                return
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, DataError | OSError) else error from error
    finally:
        ray.shutdown()


RUNNERS: Mapping[str, Callable[[list[Job], int], Iterator[Done]]] = {
    "processes": run_in_processes,
    "ray": run_on_ray,
}
