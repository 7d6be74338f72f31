"""`wm_train.worker` with a fault: `python faulty_worker.py KIND RANK STEP -- --config run.json`.
The fault is the named rank's alone."""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch

from wm_train import trainer, worker
from wm_train.boxes import local_tensor
from wm_train.objectives import flow_matching
from wm_train.resilience.guard import BadStepError

SIGNALS = {"segfault": signal.SIGSEGV, "die": signal.SIGKILL, "stop": signal.SIGSTOP}


def poison(kind: str, at: int) -> None:
    """The loss of step `at` becomes NaN or a thousand times itself, or its gradient infinite; or
    every step from it on is slow."""
    true, calls = flow_matching.flow_matching, [0]

    def poisoned(*arguments):
        calls[0] += 1
        out = true(*arguments)
        if kind == "slow" and calls[0] >= at:
            time.sleep(0.8)
        if calls[0] != at or kind == "slow":
            return out
        if kind == "inf-gradient":
            out.loss.register_hook(lambda gradient: gradient * float("inf"))
            return out
        return dataclasses.replace(
            out, loss=out.loss * {"nan": float("nan"), "x1000": 1000.0}[kind]
        )

    flow_matching.flow_matching = poisoned


def after_step(kind: str, at: int) -> None:
    """Something happens to this process, or to one bit of a weight, when step `at` has been
    taken."""
    true = trainer.train_step

    def step_and_fault(stage, state, batch, step, *rest):
        result = true(stage, state, batch, step, *rest)
        if step == at and kind == "flip":
            weight = local_tensor(
                next(p for p in state.model.parameters() if local_tensor(p).numel() > 8)
            ).detach()
            weight.view(torch.int32).reshape(weight.numel())[5] ^= 1 << 7
        elif step == at:
            os.kill(os.getpid(), SIGNALS[kind])
        return result

    trainer.train_step = step_and_fault


def keep_state_of_a_bad_step() -> None:
    """Write this rank's state when the guard raises to `state_of_rank_R.pt` beside the config."""
    true = trainer.train_step

    def step_or_keep(stage, state, *rest):
        try:
            return true(stage, state, *rest)
        except BadStepError:
            held = {name: local_tensor(tensor).clone() for name, tensor in state.tensors().items()}
            path = Path(stage.plan.out) / f"state_of_rank_{stage.world.rank}.pt"
            torch.save({name: tensor for name, tensor in held.items() if tensor.numel()}, path)
            raise

    trainer.train_step = step_or_keep


if __name__ == "__main__":
    keep_state_of_a_bad_step()
    kind, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if int(os.environ["RANK"]) == rank:
        (after_step if kind in SIGNALS or kind == "flip" else poison)(kind, step)
    worker.end_process(worker.main(sys.argv[5:]))
