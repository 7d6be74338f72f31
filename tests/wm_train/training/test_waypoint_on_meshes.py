"""Waypoint's pretraining on processes: rows of several clips and of one, over a sequence group
or by FSDP2, have the losses of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

SHORT = "recipe.stages.short."
MESHES = {
    "cp2": (2, ("parallel.cp=2",)),
    "cp4": (4, ("parallel.cp=4",)),
    "need": (2, ("parallel.cp=2", "parallel.attention_exchange=need")),
    "usp": (2, ("parallel.cp=2", "parallel.attention_exchange=usp")),
    "fsdp2": (2, ("parallel.cp=1",)),
    "fsdp2xcp2": (4, ("parallel.cp=2",)),
}
ROWS = {"packed": (), "single": (f"{SHORT}data={{pack:false}}", f"{SHORT}frames=41")}
STEPS = 8


@pytest.fixture(scope="module")
def losses(worker_config, run_ranks, pretrained_waypoint) -> Callable[..., list[float]]:
    """losses(folder, rows, count, *mesh) -> the loss of every step."""

    def train(folder: Path, rows: str, count: int, *mesh: str) -> list[float]:
        settings = (*pretrained_waypoint, *ROWS[rows], f"{SHORT}steps={STEPS}", *mesh)
        config = worker_config(folder, *settings)
        run_ranks(count, "-m", "wm_train.worker", "--config", config, timeout=400)
        steps = read_steps(folder / "demo" / "short" / "metrics.jsonl")
        return [row["loss"] for row in steps]

    return train


@pytest.fixture(scope="module")
def alone(losses, tmp_path_factory) -> Callable[[str], list[float]]:
    """alone(rows) -> the losses of one process, made once."""
    known: dict[str, list[float]] = {}

    def find(rows: str) -> list[float]:
        if rows not in known:
            known[rows] = losses(tmp_path_factory.mktemp(rows), rows, 1)
        return known[rows]

    return find


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rows", ROWS)
def test_any_mesh_has_the_losses_of_one_process(losses, alone, tmp_path, rows, mesh):
    expected = alone(rows)
    assert len(set(expected)) == STEPS
    count, settings = MESHES[mesh]
    found = losses(tmp_path, rows, count, *settings)
    apart = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f"{rows}, {mesh}: {apart:.1e} apart")
    assert apart <= 1e-6
