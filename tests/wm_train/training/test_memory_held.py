"""No process ever holds the whole model: the memory of two ranks that make a sharded one, train,
save and go on from what they saved."""

import json
from pathlib import Path

import pytest
import torch

from wm_train.config.typed import from_json
from wm_train.models.spec import build_model

pytestmark = pytest.mark.full
WORKER = Path(__file__).with_name("memory_worker.py")
# 400 MB in blocks of 13. Only the output layer is trained, so that moments, average and activations
# do not hide what weights take.
MODEL = (
    "model.width=384",
    "model.depth=32",
    "model.heads=8",
    "recipe.stages.short.optimizer.ema_decay=0",
)
FROZEN = (
    "recipe.stages.short.frozen=[blocks.*,*embedder*,t_block.*]",
    "recipe.stages.short.frames=9",
    "trainer.async_checkpoint=false",
)


@pytest.fixture
def share(worker_config, run_ranks, monkeypatch):
    """share(folder, how, steps): the largest share of the model's bytes that either rank held."""
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # or glibc keeps what tensors gave back, and it would be counted

    def measure(folder: Path, how: str, steps: int) -> float:
        config = worker_config(folder, *MODEL, *FROZEN, f"recipe.stages.short.steps={steps}")
        run_ranks(2, WORKER, how, "--", "--config", config, timeout=500)
        with torch.device("meta"):
            whole = sum(
                4 * p.numel() for p in build_model(from_json(config.read_text()).model).parameters()
            )
        peaks = [json.loads((folder / f"peak_{rank}.json").read_text()) for rank in range(2)]
        print(
            f"{how}, until step {steps}: at most {max(peaks) / 2**20:.0f} of the model's"
            f" {whole / 2**20:.0f} MiB"
        )
        return max(peaks) / whole

    return measure


def test_no_rank_ever_holds_the_whole_model(share, tmp_path):
    assert share(tmp_path / "sharded", "sharded", 1) < 0.85, "made, trained, saved"
    assert share(tmp_path / "sharded", "sharded", 2) < 0.85, "made, loaded, trained, saved"
    assert share(tmp_path / "whole", "whole", 1) > 1.0, (
        "the measurement sees a whole model where there is one"
    )
