"""Save in the background: copy the state to reused host buffers, then write and commit it in a
thread.

At most one save is in progress. A failed one is reported when the next begins or the stage ends;
committed checkpoints are untouched. The thread has a process group of its own, so checkpoint
collectives never interleave with training collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from wm_train.checkpoint import writer
from wm_train.checkpoint.manifest import CheckpointError, TakenError
from wm_train.config.schema import TrainerConfig
from wm_train.storage import Place
from wm_train.world import World


class Saver:
    """Commit states under `root`. Every rank creates one and calls it at the same steps."""

    def __init__(
        self,
        root: Place,
        stage: str,
        config: TrainerConfig,
        world: World,
        report: Callable[[str], None],
        lost: Callable[[], list[str]] = list,
    ) -> None:
        self.root, self.stage, self.config, self.report, self.lost = (
            root,
            stage,
            config,
            report,
            lost,
        )
        self._world = world.duplicate() if config.async_checkpoint else world
        self._buffers: dict[str, torch.Tensor] | None = {} if config.async_checkpoint else None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._crash: Exception | None = None
        self.passing = False  # of the last failure: trying again may help

    def save(
        self, step: int, tensors: Iterable[tuple[str, torch.Tensor]], facts: dict[str, Any]
    ) -> None:
        """Begin to save the state after `step` finished steps; return once training may change the
        tensors again.

        A save that fails (a full disk, for example) costs that checkpoint, not the run: it is
        reported and the next one is tried.
        """
        self.wait()
        state = writer.copy_to_host(tensors, self._world.rank, self._buffers)
        if self._buffers is None:
            self._commit(step, state, facts)
            self.wait()
        else:
            # A daemon, since peers of a failed run may never answer; a half-written folder is no
            # checkpoint.
            self._thread = threading.Thread(
                target=self._run, args=(step, state, facts), name="checkpoint", daemon=True
            )
            self._thread.start()

    def wait(self) -> bool:
        """Wait for the save in progress, if any; return True if the last one succeeded.

        Errors: RuntimeError when `lost` names a rank that will not answer; any exception that ended
        the thread.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                if self._thread.is_alive() and (lost := self.lost()):
                    # a rank that has finished its part and left is no failure
                    self._thread.join(1.0)
                    if not self._thread.is_alive():
                        break
                    raise RuntimeError(f"waiting for a save: {'; '.join(lost)}")
            self._thread = None
        if self._crash is not None:
            raise self._crash
        failure, self._failure = self._failure, None
        if failure is not None:
            self.report(str(failure))
        return failure is None

    def _run(self, *work: Any) -> None:
        try:
            self._commit(*work)
        except Exception as error:  # of whatever kind: `wait` raises it
            self._crash = error

    def _commit(self, step: int, state: writer.HostCopy, facts: dict[str, Any]) -> None:
        try:
            writer.commit(self.root, step, self.stage, state, facts, self._world)
        except TakenError as error:  # no later save would do better
            self._crash = error
            return
        except CheckpointError as error:  # the same on all ranks, so all of them go on
            self._failure, self.passing = error, error.passing
            return
        try:
            writer.prune(
                self.root,
                self.config.keep_last,
                self.config.keep_every,
                self._world,
                self.config.keep_best,
            )
        except CheckpointError as error:  # costs room, not the checkpoint
            self.report(str(error))
