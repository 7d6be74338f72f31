"""Each kind of MoWorld's stages on processes: an expert on whole clips, an expert behind a history
and both as one student have the losses of one process on every sequence mesh."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

KINDS = {"clips": ("high", "short"), "behind": ("low", "behind"), "turns": ("", "long")}
MESHES = {
    "ulysses 2": (2, ("parallel.cp=2",)),
    "ulysses 4": (4, ("parallel.cp=4",)),
    "ring 4": (4, ("parallel.ulysses=1", "parallel.ring=4")),
    "2 x 2": (4, ("parallel.ulysses=2", "parallel.ring=2")),
}
STEPS = 6
BEFORE = (("high", "short"), ("low", "short"), ("high", "behind"), ("low", "behind"))


@pytest.fixture(scope="module")
def trained(pool_config, run_ranks, small_moworld) -> Callable[..., list[float]]:
    """trained(folder, pool, stage, count, *mesh) -> the loss of every step."""

    def train(folder: Path, pool: str, stage: str, count: int, *mesh: str) -> list[float]:
        steps = f"recipe.stages.{stage}.steps={STEPS}"
        config = pool_config(folder, pool, stage, *small_moworld, steps, *mesh)
        run_ranks(count, "-m", "wm_train.worker", "--config", config, timeout=400)
        rows = read_steps(folder / "demo" / pool / stage / "metrics.jsonl")
        return [row["loss"] for row in rows]

    return train


@pytest.fixture(scope="module")
def before(trained, tmp_path_factory) -> Path:
    """A folder in which both pools have trained their own stages on one process."""
    folder = tmp_path_factory.mktemp("before") / "run"
    for pool, stage in BEFORE:
        trained(folder, pool, stage, 1)
    return folder


def without(before: Path, folder: Path, pool: str, stage: str) -> Path:
    """Copy what comes before a stage."""
    shutil.copytree(before, folder)
    shutil.rmtree(folder / "demo" / pool / stage, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def alone(trained, before, tmp_path_factory) -> Callable[[str], list[float]]:
    """alone(kind) -> the losses of one process, made once."""
    known: dict[str, list[float]] = {}

    def find(kind: str) -> list[float]:
        if kind not in known:
            folder = without(before, tmp_path_factory.mktemp("alone") / "run", *KINDS[kind])
            known[kind] = trained(folder, *KINDS[kind], 1)
        return known[kind]

    return find


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_mesh_has_the_losses_of_one_process(trained, alone, before, tmp_path, kind, mesh):
    expected = alone(kind)
    assert len(set(expected)) == STEPS
    count, settings = MESHES[mesh]
    folder = without(before, tmp_path / "run", *KINDS[kind])
    found = trained(folder, *KINDS[kind], count, *settings)
    apart = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    print(f"{kind}, {mesh}: {apart:.1e} apart")
    assert apart <= 1e-6
