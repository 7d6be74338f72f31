"""Our step against a bare PyTorch loop: the same model, objective, clips and optimizer, data in
memory, one process.

    python benchmarks/overhead.py --pairs 60
    # with an MLflow server that is down
    python benchmarks/overhead.py --pairs 60 tracker=mlflow tracker.uri=http://127.0.0.1:9

The bare loop is what one would write in a notebook: objective, backward, clip_grad_norm_, AdamW,
EMA by hand. The two take turns step by step on the same batch, and who goes first changes every
pair, so that whatever else the machine does meets both. Prints the medians and the median of the
ratios of pairs, with their quartiles. FSDP, the step guard, the gathered figures and JSONL are what
ours does besides.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from data_shards.loading.load import Batch
from wm_train.backends import get_backend
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.registry import builder
from wm_train.models.init import initialise_
from wm_train.models.spec import build_model
from wm_train.optim.schedule import learning_rate
from wm_train.resilience.guard import Guard
from wm_train.resilience.preemption import StopRequest
from wm_train.resilience.stragglers import Stragglers
from wm_train.tracking.tracker import Tracker
from wm_train.trainer import speed
from wm_train.training.data import clips_of, open_loader
from wm_train.training.stage import Stage, open_stage
from wm_train.training.state import build_state
from wm_train.training.step import train_step
from wm_train.training.step_clock import StepClock
from wm_train.world import join_world, leave_world

WARM_UP = 4  # pairs that are not timed


class Ours:
    """Run a step as the trainer does, from a batch to its record."""

    def __init__(self, stage: Stage, tracker: Tracker) -> None:
        self.stage, self.tracker = stage, tracker
        self.state, self.guard = (
            build_state(stage.plan, stage.mesh.fsdp, stage.backend.device),
            Guard(stage.plan.trainer),
        )
        self.clock, self.stragglers = (
            StepClock(stage, self.state),
            Stragglers(stage.plan.trainer.straggler_factor),
        )

    def step(self, batch: Batch, step: int) -> float:
        started = time.perf_counter()
        self.clock.begin()
        report = train_step(
            self.stage, self.state, batch, step, self.guard, StopRequest(), self.clock
        )
        figures = report.figures | self.clock.end(batch.data_wait_s)
        self.tracker.step(step, figures | speed(self.stage, figures["step_s"], report.work))
        self.stragglers.seen(step, report.times)
        return time.perf_counter() - started


class Bare:
    """The notebook loop."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.config = stage, stage.config.optimizer
        self.model = build_model(stage.config.model)
        initialise_(self.model, stage.plan.seed)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": self.config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.config.lr, betas=self.config.betas, eps=self.config.eps
        )
        self.ema = [p.detach().clone() for p in self.model.parameters()]

    def step(self, batch: Batch, step: int) -> float:
        stage, started = self.stage, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step - 1, stage.config.steps)
        self.optimizer.zero_grad()
        objective = stage.config.objective
        output = builder(objective)(self.model, clips_of(stage, batch), objective)
        loss = output.loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                self.ema, [p.detach() for p in self.model.parameters()], 1 - self.config.ema_decay
            )
        loss.item()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data/demo", help="a data set; `make train` records one")
    parser.add_argument(
        "--pairs",
        type=int,
        default=60,
        help="steps of each that are timed, after four that are not",
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for wm_train.launch")
    options = parser.parse_args()
    run = compose(
        [
            "experiment=demo",
            "recipe=demo",
            "stage=short",
            f"data.path={options.data}",
            "launcher=inline",
            "tracker=none",
            *options.overrides,
        ]
    )
    backend = get_backend("cpu")
    world = join_world(backend, 60.0)
    stage = open_stage(plan_stage(run, run.stage), backend, world)
    with open_loader(stage, "train", stage.config.global_batch) as loader:
        batches = [next(loader) for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(stage.plan, Path(folder), 0, print)
        contestants = [Ours(stage, tracker), Bare(stage)]
        pairs = []
        for number in range(-WARM_UP, options.pairs):
            seconds = [0.0, 0.0]
            for who in (0, 1) if number % 2 else (1, 0):
                seconds[who] = contestants[who].step(
                    batches[number % len(batches)], number + WARM_UP + 1
                )
            if number >= 0:
                pairs.append(seconds)
        tracker.close(timeout_s=1.0)
    leave_world()
    ours, bare = (median(pair[who] for pair in pairs) for who in (0, 1))
    low, middle, high = quantiles([our / their for our, their in pairs], n=4)
    print(
        f"{len(pairs)} pairs: ours {ours:.4f} s, bare loop {bare:.4f} s per step (medians), ratio"
        f" of medians {ours / bare:.3f}"
    )
    print(f"median ratio of pairs {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
