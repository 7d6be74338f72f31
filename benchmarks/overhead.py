"""Our step against a bare PyTorch loop: the same model, objective, clips and optimizer, data in memory, one process; paired rounds.

    python benchmarks/overhead.py --rounds 6 --steps 10

The bare loop is what one would write in a notebook: objective, backward, clip_grad_norm_, AdamW, EMA by hand. Prints seconds per step of
both in each round, and the ratio. FSDP, the step guard, the gathered figures and JSONL are what ours does besides.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from data_shards.load import Batch
from wm_train.backends import get_backend
from wm_train.compose import compose
from wm_train.config import RunConfig
from wm_train.guard import Guard
from wm_train.models import build_model
from wm_train.models.init import initialise_
from wm_train.objectives import OBJECTIVES
from wm_train.optim.schedule import learning_rate
from wm_train.preemption import StopRequest
from wm_train.stage import Stage, conditions_of, open_loader, open_stage, sequence_of
from wm_train.state import TrainState, build_state
from wm_train.tracking import Tracker
from wm_train.trainer import speed, train_step
from wm_train.world import join_world, leave_world


def ours(stage: Stage, state: TrainState, batches: list[Batch], first: int, guard: Guard, tracker: Tracker) -> float:
    started = time.perf_counter()
    for offset, batch in enumerate(batches):
        begun = time.perf_counter()
        figures = train_step(stage, state, batch, first + offset, guard, StopRequest())
        tracker.step(first + offset, figures | speed(stage, time.perf_counter() - begun))
    return (time.perf_counter() - started) / len(batches)


class Bare:
    """The notebook loop."""

    def __init__(self, stage: Stage, run: RunConfig) -> None:
        self.stage, self.config = stage, stage.config.optimizer
        self.model = build_model(run.model)
        initialise_(self.model, run.seed)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, eps=self.config.eps)
        self.ema = [p.detach().clone() for p in self.model.parameters()]

    def run(self, batches: list[Batch], first: int) -> float:
        stage, started = self.stage, time.perf_counter()
        for offset, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, first + offset - 1, stage.config.steps)
            self.optimizer.zero_grad()
            objective = OBJECTIVES[stage.config.objective.name]
            output = objective(
                self.model, batch, stage.noise, stage.config.objective, sequence_of(stage, batch), conditions_of(stage, batch)
            )
            loss = output.loss.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, [p.detach() for p in self.model.parameters()], 1 - self.config.ema_decay)
            loss.item()
        return (time.perf_counter() - started) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo", help="a data set; `make train` records one")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("overrides", nargs="*", help="key=value, as for wm_train.launch")
    options = parser.parse_args()
    run = compose(["experiment=demo", "stage=short", f"data.path={options.data}", "launcher=inline", "tracker=none", *options.overrides])
    backend = get_backend("cpu")
    world = join_world(backend, 60.0)
    stage = open_stage(run, backend, world)
    state, bare, guard = build_state(run, stage.mesh.fsdp, backend.device), Bare(stage, run), Guard(run.trainer)
    with open_loader(stage, "train", stage.config.global_batch) as loader:
        batches = [next(loader) for _ in range(options.steps)]
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(run, run.stage, Path(folder), 0, print)
        pairs = [(ours(stage, state, batches, 1, guard, tracker), bare.run(batches, 1)) for _ in range(options.rounds + 1)][1:]
        tracker.close()
    leave_world()
    for number, (our, their) in enumerate(pairs, 1):
        print(f"round {number}: ours {our:.4f} s, bare loop {their:.4f} s per step, ratio {our / their:.3f}")
    print(f"median ratio {median(our / their for our, their in pairs):.3f}")


if __name__ == "__main__":
    main()
