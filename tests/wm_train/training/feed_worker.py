"""One process of the feed's tests.

look <config> <folder>: reads three batches with parallel.cp=2 through a filesystem that counts,
  then twelve on its own copy of the data set, as on a node with a local disk; saves the batches
  and their cost.
train <config> <folder>: trains on its own copy.
"""

import dataclasses
import sys
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from wm_train.backends import get_backend
from wm_train.config.curriculum import StagePlan, plan_stage
from wm_train.config.schema import RunConfig
from wm_train.config.typed import from_json
from wm_train.console import Progress
from wm_train.resilience.preemption import StopRequest
from wm_train.trainer import train_stage
from wm_train.training.data import on_device, open_loader
from wm_train.training.stage import open_stage
from wm_train.worker import end_process
from wm_train.world import World, join_world, leave_world


class CountingFileSystem(LocalFileSystem):
    """The local filesystem under another name, noting what is read from shards."""

    protocol = "counting"
    reads = []  # noqa: RUF012  (shared by design: fsspec makes the instance)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("counting://"))

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start=start, end=end, **options)
        if path.endswith(".tar"):
            type(self).reads.append(len(data))
        return data


def look(run: RunConfig, world: World, folder: Path) -> None:
    fsspec.register_implementation("counting", CountingFileSystem)
    plan = plan_stage(run, run.stage)
    parallel = dataclasses.replace(plan.config.parallel, cp=2)
    path = f"counting://{plan.config.data.path}"
    split = on_data(plan, path, prefetch=1)
    split = dataclasses.replace(split, config=dataclasses.replace(split.config, parallel=parallel))
    stage = open_stage(split, get_backend("cpu"), world)
    with open_loader(stage, "train", stage.config.global_batch) as feed:
        batches = [on_device(stage, next(feed)) for _ in range(3)]
        seen = CountingFileSystem.reads.copy()
    kept = [{f.name: getattr(b, f.name) for f in dataclasses.fields(b)} for b in batches]
    stage = open_stage(on_own_copy(run, world, folder), get_backend("cpu"), world)
    said: list[str] = []
    with open_loader(stage, "train", stage.config.global_batch, report=said.append) as feed:
        keys = [(next(feed).keys, feed.quarantined) for _ in range(12)]
    torch.save(
        {"batches": kept, "reads": seen, "keys": keys, "said": said},
        folder / f"rank{world.rank}.pt",
    )


def on_data(plan: StagePlan, path: str, **more: int) -> StagePlan:
    """Return the stage on another data set."""
    data = dataclasses.replace(plan.config.data, path=path, **more)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, data=data))


def on_own_copy(run: RunConfig, world: World, folder: Path) -> StagePlan:
    return on_data(plan_stage(run, run.stage), str(folder / f"node{world.rank}"))


def main(action: str, config: Path, folder: Path) -> None:
    run = from_json(config.read_text())
    world = join_world(get_backend("cpu"), 60.0)
    if action == "look":
        look(run, world, folder)
    else:
        train_stage(
            on_own_copy(run, world, folder),
            get_backend("cpu"),
            world,
            Progress(speaks=world.rank == 0),
            StopRequest(),
        )
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    end_process(0)
