"""Run one rank of a stage, started by a launcher: `python -m wm_train.worker --config
resolved.json`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher, the rest from the
resolved config, whose `stage` names one stage. Exit codes: 0 the stage is done; 2 a person must
change something (a mistake, a damaged shard, a full disk, another run holds the folder's lock), so
a restart would not help; 74 storage was unreachable for `data.retry_s`, or at the last save; 75
stopped by SIGTERM, SIGUSR1 or Ctrl-C, with the state saved: start the same command again to resume;
1 anything else.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wm_train.console import complain, take_token
from wm_train.errors import (
    DONE,
    FAILED,
    NO_STORAGE,
    PREEMPTED,
    USER_ERROR,
    SetupError,
    StorageError,
)
from wm_train.redact import clean_output
from wm_train.storage import read_regular

if TYPE_CHECKING:
    from wm_train.resilience.preemption import StopRequest


@clean_output()
def main(argv: list[str] | None = None, work: Callable[..., None] | None = None) -> int:
    """Run one rank of one stage: train it, or do other `work` on it.

    work: called as `trainer.train_stage` is, but with the whole run.
    """
    token = take_token()
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.worker", description="One rank of one stage; launchers start this."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="resolved config of the run, as JSON"
    )
    parser.add_argument("--sha256", help="of that file, as the command wrote it")
    parser.add_argument(
        "--command", help="names the command that started this rank, the same after a restart"
    )
    parser.add_argument(
        "--trajectories", action="store_true", help="run the stage's data job, and train nothing"
    )
    options = parser.parse_args(argv)

    from wm_train.resilience.preemption import Preempted, StopRequest

    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest()
    try:
        stop.listen()
        return run_rank(rank, options, work, stop, token)
    except Preempted as reason:
        if rank == 0:
            complain(str(reason))
        return PREEMPTED


def run_rank(
    rank: int,
    options: argparse.Namespace,
    work: Callable[..., None] | None,
    stop: StopRequest,
    token: str,
) -> int:
    """Run the work of one rank; return its exit code. Raises Preempted when asked to stop."""
    from data_shards.schema import DataError
    from wm_train.backends import get_backend
    from wm_train.backends.protocol import use_deterministic_kernels
    from wm_train.checkpoint.manifest import TakenError
    from wm_train.checks.nodes import preflight
    from wm_train.config.curriculum import plan_stage
    from wm_train.config.problems import ConfigError
    from wm_train.config.typed import from_json
    from wm_train.console import Progress
    from wm_train.resilience.one_run import only_run
    from wm_train.resilience.run_lock import OwnedError
    from wm_train.trainer import prepare_stage, train_stage
    from wm_train.world import join_world, leave_world

    try:
        text, digest = read_config(options.config, options.sha256)
        run = from_json(text)
        plan = replace(plan_stage(run, run.stage), command=options.command or digest)
        try:
            backend = get_backend(
                run.backend.name, run.backend.threads, int(os.environ.get("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise SetupError(str(error)) from error
        if run.backend.deterministic:
            use_deterministic_kernels()
        if rank == 0 and backend.device.type != "cpu":  # which kernels run is news there
            logging.basicConfig(format="%(message)s")
            logging.getLogger("wm_train.kernels").setLevel(logging.INFO)
        progress = Progress(speaks=rank == 0, token=token)
        progress.mark("imports")
        world = join_world(backend, run.backend.collective_timeout_s)
        progress.mark("rendezvous")
        with only_run(plan.directory, world, None if work else plan.checkpoints):
            if run.launcher.preflight:
                preflight(plan, backend, world, progress)
                progress.mark("checks")
            if options.trajectories:
                prepare_stage(plan, backend, world, progress, stop)
            elif work is None:
                train_stage(plan, backend, world, progress, stop)
            else:
                work(run, backend, world, progress, stop)
    except (ConfigError, SetupError, OwnedError, TakenError) as error:
        complain(f"rank {rank} on {socket.gethostname()}: {error}")
        return USER_ERROR
    # what lies there will not mend itself, what could not be reached may be there again
    except (DataError, StorageError) as error:
        complain(f"rank {rank} on {socket.gethostname()}: {error}")
        return NO_STORAGE if error.passing else USER_ERROR
    # the outermost frame: report the rank, and exit with the code that launchers act on
    except Exception:
        stop.leave_if_saved()  # a peer that left sooner breaks what this rank waits for
        complain(f"rank {rank} failed:\n{traceback.format_exc()}")
        return FAILED
    leave_world()
    return DONE


def read_config(path: Path, expected: str | None) -> tuple[str, str]:
    """Return the text of a config and its sha256. Raises SetupError when it is not `expected`: the
    file lies in the run's folder, where another command may have written since."""
    data = read_regular(path)
    digest = hashlib.sha256(data).hexdigest()
    if expected and digest != expected:
        raise SetupError(
            f"config {path}: got another config than the command that started this worker wrote"
            f" (sha256 {digest[:12]}, expected {expected[:12]}). Fix: start the command again, and"
            " other settings under another name=..."
        )
    return data.decode("utf-8"), digest


def end_process(code: int) -> NoReturn:
    """End at once, without the interpreter's clean-up: threads and connections may wait for peers
    that will not answer; and gloo aborts the process if one of its threads releases a tensor during
    clean-up (pytorch/pytorch pull request 179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main())
