"""Turns of several networks on two processes, FSDP2 over both: data parallel and as a sequence
group, from the start and from inside a cycle; Waypoint's recipe with its tied parameters, too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

LONG = "recipe.stages.long."
CYCLES = (f"{LONG}steps=12", f"{LONG}turns=CCCCCS")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_steps(folder / "demo" / "long" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def on_ranks(worker_config, run_ranks, distilled) -> Callable[..., None]:
    """on_ranks(folder, count, *overrides): train the distilled stage on so many processes."""

    def train(folder: Path, count: int, *overrides: str) -> None:
        config = worker_config(folder, *distilled.stage, *CYCLES, *overrides)
        run_ranks(count, "-m", "wm_train.worker", "--config", config, timeout=400)

    return train


@pytest.fixture(scope="module")
def source(worker_config, run_ranks, distilled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    run_ranks(1, "-m", "wm_train.worker", "--config", worker_config(folder, *distilled.source))
    return folder


@pytest.fixture(scope="module")
def alone(on_ranks, source, tmp_path_factory) -> list[float]:
    """The losses of two cycles on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(source, folder)
    on_ranks(folder, 1)
    return losses(folder)


@pytest.mark.full
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((), ("parallel.cp=1",)),
        ((), ("parallel.cp=2",)),
        (("parallel.cp=1",), ()),  # one process takes up in mid-cycle what two have begun
        ((), ("parallel.ring=2",)),
    ],
    ids=["fsdp", "ulysses", "two-to-one", "ring"],
)
def test_two_processes_take_the_turns_of_one(on_ranks, source, alone, tmp_path, first, second):
    """Also after three turns of six on another number of processes."""
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    if first or second != ("parallel.cp=1",):
        on_ranks(folder, 2 if first else 1, f"{LONG}steps=3", *first)
    on_ranks(folder, 2 if second else 1, *second)
    assert losses(folder) == pytest.approx(alone, rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["parallel.cp=1", "parallel.cp=2"])
def test_rollouts_ahead_change_no_bit_where_weights_are_sharded(on_ranks, source, tmp_path, mesh):
    """The student's weights stay gathered over a cycle's rollouts, and are sharded for its turn."""
    found = []
    for how in ("each", "ahead"):
        shutil.copytree(source, tmp_path / how)
        on_ranks(tmp_path / how, 2, mesh, f"{LONG}steps=7", f"{LONG}distill.rollouts={how}")
        found.append(losses(tmp_path / how))
    assert len(found[0]) == 7
    assert found[0] == found[1]


@pytest.mark.full
def test_two_processes_take_waypoints_turns_as_one(
    worker_config, run_ranks, distilled_waypoint, tmp_path
):
    """Its tied projections sharded, packed passes and score networks split over two processes, or a
    clip for each; losses of a cycle within 1e-6."""

    def train(folder, count, settings):
        config = worker_config(folder, *settings)
        run_ranks(count, "-m", "wm_train.worker", "--config", config, timeout=400)

    train(tmp_path / "source", 1, distilled_waypoint.source)
    found = {}
    for name, count, mesh in (
        ("one", 1, ()),
        ("cp", 2, ("parallel.cp=2",)),
        ("ring", 2, ("parallel.ring=2",)),
        ("fsdp", 2, ("parallel.cp=1",)),
    ):
        shutil.copytree(tmp_path / "source", tmp_path / name)
        train(tmp_path / name, count, (*distilled_waypoint.stage, f"{LONG}steps=4", *mesh))
        found[name] = losses(tmp_path / name)
    assert len(found["one"]) == 4
    for name in ("cp", "ring", "fsdp"):
        assert found[name] == pytest.approx(found["one"], rel=1e-6), name
