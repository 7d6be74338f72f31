"""Waypoint's pretraining on processes: rows of several clips and of one, over a sequence group
or by FSDP2, have the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from wm_train.tracking.tracker import read_steps

SHORT = "recipe.stages.short."
MESHES = {
    "cp 2": (2, ("parallel.cp=2",)),
    "cp 4": (4, ("parallel.cp=4",)),
    "needed frames": (2, ("parallel.cp=2", "parallel.attention_exchange=need")),
    "ulysses": (2, ("parallel.cp=2", "parallel.attention_exchange=usp")),
    "fsdp 2": (2, ("parallel.cp=1",)),
    "fsdp 2 x cp 2": (4, ("parallel.cp=2",)),
}
ROWS = {"packed": (), "one clip a row": (f"{SHORT}data={{pack:false}}", f"{SHORT}frames=41")}
STEPS = 8


@pytest.mark.full
@pytest.mark.parametrize("rows", ROWS)
def test_any_mesh_has_the_losses_of_one_process(
    worker_config, run_ranks, pretrained_waypoint, tmp_path, rows
):
    def losses(folder: Path, count: int, *mesh: str) -> list[float]:
        settings = (*pretrained_waypoint, *ROWS[rows], f"{SHORT}steps={STEPS}", *mesh)
        config = worker_config(folder, *settings)
        run_ranks(count, "-m", "wm_train.worker", "--config", config, timeout=400)
        steps = read_steps(folder / "demo" / "short" / "metrics.jsonl")
        return [row["loss"] for row in steps]

    alone = losses(tmp_path / "alone", 1)
    assert len(set(alone)) == STEPS
    apart = {}
    for name, (count, mesh) in MESHES.items():
        found = losses(tmp_path / name.replace(" ", "_"), count, *mesh)
        apart[name] = max(abs(a - b) / b for a, b in zip(found, alone, strict=True))
    print({name: f"{figure:.1e}" for name, figure in apart.items()})
    assert max(apart.values()) <= 1e-6
