"""A request to stop while data are awaited, while a validation runs, and when all is saved."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from wm_train.resilience.preemption import Preempted, StopRequest, StopSeenError
from wm_train.training.feed import Feed
from wm_train.world import World


class Peers(World):
    """The ranks of a run, of which another one was asked to stop, or none."""

    def gather_numbers(self, values: list[float]) -> torch.Tensor:
        return torch.tensor([values, [float(self.rank == 1)]])


class SilentLoader:
    """A loader whose storage does not answer until `answers` looks have been made."""

    step = 0

    def __init__(self, answers: int, stop: StopRequest | None = None) -> None:
        self.looks, self.answers, self.stop, self.waited = 0, answers, stop, None

    def ready(self, wait_s: float) -> bool:
        self.looks += 1
        if self.stop and self.looks == 3:
            self.stop.raised = True
        return self.looks >= self.answers

    def __next__(self) -> str:
        return "batch"

    def close(self, wait: bool = True) -> None:
        self.waited = wait


def feed(loader: SilentLoader, world: World) -> Feed:
    config = SimpleNamespace(on_bad_shard="fail")
    return Feed(lambda *_: loader, config, world, 0, (), print)  # type: ignore[arg-type]


def test_data_that_do_not_come_are_not_waited_for() -> None:
    stop = StopRequest()
    stop.work_from_here()
    loader = SilentLoader(10**9, stop)
    waiting = feed(loader, World(0, 1))
    assert waiting.next_unless(stop) is None
    waiting.__exit__(Preempted, Preempted(""), None)
    assert loader.waited is False, "its threads hang on the storage"


@pytest.mark.parametrize(("rank", "batch"), [(0, "batch"), (1, None)])
def test_all_ranks_leave_when_one_was_asked(rank: int, batch: str | None) -> None:
    loader = SilentLoader(5)
    with feed(loader, Peers(rank, 2)) as waiting:
        assert waiting.next_unless(StopRequest()) == batch
    assert loader.looks == 5
    assert loader.waited is True


def test_a_validation_is_left_before_its_next_pass() -> None:
    stop, model = StopRequest(), torch.nn.Linear(2, 2)
    stop.work_from_here()
    with stop.watched(model, World(0, 1)):
        model(torch.zeros(2))
        stop.raised = True
        with pytest.raises(StopSeenError):
            model(torch.zeros(2))
    assert model(torch.zeros(2)).shape == (2,), "and only inside"


def test_work_that_is_unsaved_is_kept_and_nothing_else() -> None:
    stop = StopRequest()
    stop.work_from_here()
    stop._raise(15, None)
    stop.leave_if_saved()
    with pytest.raises(Preempted, match="samples"):
        stop.all_saved("the samples are not made")


def test_a_loader_says_when_its_batch_is_there(gameplay) -> None:
    from data_shards.loading.load import ClipLoader
    from data_shards.storage.read import open_dataset

    dataset = open_dataset(str(gameplay))
    given = {"seed": 0, "stage": "s", "global_batch": 1, "rows": range(1)}
    with ClipLoader(dataset, **given, frames=(0, 6), clip_frames=6) as loader:
        until = time.monotonic() + 60
        while not loader.ready(0.05):
            assert time.monotonic() < until
        assert next(loader).frames == 6
