"""Run one rank of a stage, started by a launcher: `python -m wm_train.worker --config
resolved.json`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher, the rest from the
resolved config, whose `stage` names one stage. Exit codes: 0 the stage is done; 2 a person must
change something (a mistake, a damaged shard, another run holds the folder's lock), so a restart
would not help; 74 storage was unreachable for `data.retry_s`; 75 stopped by SIGTERM or SIGUSR1,
with the state saved: start the same command again to resume; 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from wm_train.errors import DONE, FAILED, NO_STORAGE, PREEMPTED, USER_ERROR, SetupError
from wm_train.redact import clean_output


@clean_output()
def main(argv: list[str] | None = None, work: Callable[..., None] | None = None) -> int:
    """Run one rank of one stage: train it, or do other `work` on it.

    work: called as `trainer.train_stage` is, but with the whole run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.worker", description="One rank of one stage; launchers start this."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="resolved config of the run, as JSON"
    )
    config_path = parser.parse_args(argv).config

    from data_shards.schema import DataError
    from wm_train.backends import get_backend
    from wm_train.checks.nodes import preflight
    from wm_train.config.curriculum import plan_stage
    from wm_train.config.problems import ConfigError
    from wm_train.config.typed import from_json
    from wm_train.console import Progress, complain
    from wm_train.resilience.preemption import Preempted, StopRequest
    from wm_train.resilience.run_lock import OwnedError, only_run
    from wm_train.trainer import train_stage
    from wm_train.world import join_world, leave_world

    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest().listen()
    try:
        run = from_json(config_path.read_text(encoding="utf-8"))
        plan = plan_stage(run, run.stage)
        try:
            backend = get_backend(
                run.backend.name, run.backend.threads, int(os.environ.get("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise SetupError(str(error)) from error
        if rank == 0 and backend.device.type != "cpu":  # which kernels run is news there
            logging.basicConfig(format="%(message)s")
            logging.getLogger("wm_train.kernels").setLevel(logging.INFO)
        progress = Progress(speaks=rank == 0)
        progress.mark("imports")
        world = join_world(backend, run.backend.collective_timeout_s)
        progress.mark("rendezvous")
        with only_run(plan.directory, world):
            if run.launcher.preflight:
                preflight(plan, backend, world, progress)
                progress.mark("checks")
            if work is None:
                train_stage(plan, backend, world, progress, stop)
            else:
                work(run, backend, world, progress, stop)
    except (ConfigError, SetupError, OwnedError) as error:
        complain(f"rank {rank} on {socket.gethostname()}: {error}")
        return USER_ERROR
    # what lies there will not mend itself, what could not be reached may be there again
    except DataError as error:
        complain(f"rank {rank} on {socket.gethostname()}: {error}")
        return NO_STORAGE if error.passing else USER_ERROR
    except Preempted as reason:
        if rank == 0:
            complain(str(reason))
        return PREEMPTED
    # the outermost frame: report the rank, and exit with the code that launchers act on
    except Exception:
        complain(f"rank {rank} failed:\n{traceback.format_exc()}")
        return FAILED
    leave_world()
    return DONE


def end_process(code: int) -> NoReturn:
    """End at once, without the interpreter's clean-up: threads and connections may wait for peers
    that will not answer; and gloo aborts the process if one of its threads releases a tensor during
    clean-up (pytorch/pytorch pull request 179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main())
