"""Does a trained model use the camera? Flow-matching loss on held-out clips with each clip's own path, with another clip's, and with none.

`python benchmarks/camera_matters.py RUN/STAGE [--clips 4] [--draws 8]`: RUN/STAGE is a finished stage's folder; its newest checkpoint's
averaged weights are used. All three see the same noise and noise levels. Prints the three losses and their ratios to the first.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from data_shards.load import ClipLoader
from data_shards.read import open_dataset
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train import checkpoint
from wm_train.compose import from_json
from wm_train.conditioning import Conditions
from wm_train.config import RunConfig
from wm_train.curriculum import stage_run
from wm_train.models import build_model
from wm_train.models.streaming import chunk_starts
from wm_train.noise import NoiseKey
from wm_train.objectives import OBJECTIVES
from wm_train.world import World


def trained_model(run: RunConfig, folder: Path) -> torch.nn.Module:
    """The stage's model with the averaged weights of its newest checkpoint."""
    model = build_model(run.model)
    found = checkpoint.find_newest(folder / "checkpoints", World(0, 1), print)
    assert found is not None, f"no checkpoint in {folder}"
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averaged = {name for name in weights if f"ema/{name}" in found[1].tensors}
    targets = {("ema/" if name in averaged else "model/") + name: value for name, value in weights.items()}
    checkpoint.load(*found, targets, may_ignore=found[1].tensors)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="data set, if it moved")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    run = from_json((options.folder / "config.json").read_text())
    run = stage_run(run, run.stage)
    stage = run.recipe.stages[run.stage]
    model, dataset = trained_model(run, options.folder), open_dataset(options.data or run.data.path)
    frames = (stage.frames - 1) // dataset.info.temporal_stride + 1
    sequence = LocalSequence(ClipLayout(frames, chunk_starts=chunk_starts(frames, stage.chunk_frames)))
    rows, span = range(options.clips), (0, frames)
    with ClipLoader(
        dataset, split=options.split, seed=0, stage=0, global_batch=options.clips, rows=rows, frames=span, clip_frames=frames
    ) as loader:
        batch = next(loader)
    own = Conditions((dataset.info.image_height, dataset.info.image_width), dataset.info.temporal_stride, batch.c2w, batch.intrinsics)
    cases = {
        "own path": own,
        "another clip's": replace(own, c2w=batch.c2w.roll(1, 0), intrinsics=batch.intrinsics.roll(1, 0)),
        "none": replace(own, camera_keep=torch.zeros(options.clips, dtype=torch.bool)),
    }
    config = replace(stage.objective, name="flow_matching", image_condition=1.0, camera_dropout=0.0, text_dropout=0.0)
    losses = dict.fromkeys(cases, 0.0)
    with torch.no_grad():
        for draw in range(options.draws):
            part = replace(batch, draws=torch.arange(options.clips) + draw * options.clips)
            for name, seen in cases.items():
                output = OBJECTIVES["flow_matching"](model, part, NoiseKey(1, 0), config, sequence, seen)
                losses[name] += float(output.loss.mean()) / options.draws
    for name, loss in losses.items():
        print(f"{name:15} loss {loss:.5f}  {loss / losses['own path']:.4f}x")


if __name__ == "__main__":
    main()
