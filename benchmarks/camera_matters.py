"""Does a trained model use the camera? Flow-matching loss on held-out clips with each clip's own
path, with other clips', and with none.

`python benchmarks/camera_matters.py RUN/STAGE [--clips 14] [--draws 2] [--others 3]`: RUN/STAGE is
a finished stage's folder; its newest checkpoint's averaged weights are used. The first frame is
given, every frame has the same noise level, and all cases see the same noise, so that differences
are paired. "Others'" are paths of other videos, `--others` per clip. Standard errors are over
videos: two clips of one video are not independent. "None" tells something only of a model that was
trained with camera_dropout.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_shards.loading.load import Batch, ClipLoader
from data_shards.storage.read import ClipDataset, open_dataset
from data_shards.time_layout import time_of
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.checkpoint import store
from wm_train.conditioning import Conditions
from wm_train.config.kinds import ModelConfig
from wm_train.config.typed import from_json
from wm_train.models.spec import build_model
from wm_train.noise import VALIDATION, NoiseKey
from wm_train.objectives.clips import Clips
from wm_train.objectives.flow_matching import flow_matching
from wm_train.world import World

SIGMAS = (0.3, 0.5, 0.7, 0.9, 0.97)


def trained_model(config: ModelConfig, folder: Path) -> torch.nn.Module:
    """The stage's model with the averaged weights of its newest checkpoint."""
    model = build_model(config)
    found = store.find_newest(folder / "checkpoints", World(0, 1), print)
    assert found is not None, f"no checkpoint in {folder}"
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averaged = {name for name in weights if f"ema/{name}" in found[1].tensors}
    targets = {
        ("ema/" if name in averaged else "model/") + name: value for name, value in weights.items()
    }
    store.load(*found, targets, may_ignore=found[1].tensors)
    return model.eval()


def held_out(dataset: ClipDataset, split: str, clips: int, frames: int) -> Batch:
    """The first `clips` clips of a split, whole."""
    rows, span = range(clips), (0, frames)
    with ClipLoader(
        dataset,
        split=split,
        seed=0,
        stage="short",
        global_batch=clips,
        rows=rows,
        frames=span,
        clip_frames=frames,
    ) as loader:
        return next(loader)


def other_videos(episodes: list[str], count: int) -> list[list[int]]:
    """`count` permutations of the clips that give each one a clip of another video, all of them
    different."""
    order = sorted(range(len(episodes)), key=lambda clip: episodes[clip])
    found = []
    for turn in range(1, len(order)):
        partner = dict(zip(order, order[turn:] + order[:turn], strict=True))
        if all(episodes[clip] != episodes[partner[clip]] for clip in order):
            found.append([partner[clip] for clip in range(len(order))])
    assert len(found) >= count, (
        f"{len(set(episodes))} videos have {len(found)} such permutations, fewer than the {count}"
        " asked for"
    )
    return found[:: len(found) // count][:count]


def paired(difference: Tensor, episodes: list[str]) -> tuple[float, float]:
    """Mean over clips and its standard error over videos."""
    per_video = torch.stack(
        [difference[[e == video for e in episodes]].mean() for video in sorted(set(episodes))]
    )
    return float(difference.mean()), float(per_video.std() / len(per_video) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="data set, if it moved")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clips", type=int, default=14)
    parser.add_argument("--draws", type=int, default=2, help="noises per clip and noise level")
    parser.add_argument("--others", type=int, default=3, help="other paths per clip")
    options = parser.parse_args()
    run = from_json((options.folder / "config.json").read_text())
    stage = run.recipe.stages[run.stage]
    model = trained_model(stage.model, options.folder)
    dataset = open_dataset(options.data or stage.data.path)
    time = time_of(dataset.info)
    frames = time.latents(stage.frames)
    sequence = LocalSequence(
        ClipLayout(frames, chunk_starts=chunk_starts(frames, stage.chunk_frames))
    )
    batch = held_out(dataset, options.split, options.clips, frames)
    episodes = [dataset.find(key).episode for key in batch.keys]
    own = Conditions.of(
        (dataset.info.image_height, dataset.info.image_width),
        dataset.info.temporal_stride,
        batch.c2w,
        batch.intrinsics,
        grouped=time.layout == "grouped",
    )
    others = [
        own.with_fields(c2w=batch.c2w[clips], intrinsics=batch.intrinsics[clips])
        for clips in other_videos(episodes, options.others)
    ]
    none = replace(own, camera_keep=torch.zeros(options.clips, dtype=torch.bool))

    @torch.no_grad()
    def losses(seen: Conditions, sigma: float) -> Tensor:
        """Loss of each clip, mean over the draws, [clips]."""
        config = stage.objective.held_out(sigma)
        total = torch.zeros(options.clips)
        for draw in range(options.draws):
            part = replace(batch, draws=torch.arange(options.clips) + draw * options.clips)
            key = NoiseKey(1, VALIDATION)
            clips = Clips(part.latents, part.draws, seen, sequence, key)
            total += flow_matching(model, clips, config).loss
        return total / options.draws

    print(
        f"{options.folder}: {options.clips} {options.split} clips of {len(set(episodes))} videos,"
        f" {stage.frames} frames"
    )
    print("sigma   own path  others'   others' - own       none     none - own")
    rows = []
    for sigma in SIGMAS:
        rows.append(
            torch.stack(
                [
                    losses(own, sigma),
                    torch.stack([losses(o, sigma) for o in others]).mean(0),
                    losses(none, sigma),
                ]
            )
        )
        report(f"{sigma:<6}", rows[-1], episodes)
    everything = torch.stack(rows).mean(0)
    report("mean  ", everything, episodes)
    better = int((everything[0] < everything[1]).sum())
    mean, error = paired(everything[1] - everything[0], episodes)
    print(
        f"own path better for {better} of {options.clips} clips; others' / own ="
        f" {1 + mean / float(everything[0].mean()):.4f}"
    )
    print(
        f"the camera {'matters' if mean > 2 * error else 'is not shown to matter'}:"
        f" {mean / error:.1f} standard errors"
    )


def report(label: str, cases: Tensor, episodes: list[str]) -> None:
    own, others, none = cases
    (shuffled, shuffled_error), (dropped, dropped_error) = (
        paired(others - own, episodes),
        paired(none - own, episodes),
    )
    print(
        f"{label}  {own.mean():.4f}    {others.mean():.4f}    {shuffled:+.4f} ±"
        f" {shuffled_error:.4f}   {none.mean():.4f}   {dropped:+.4f} ± {dropped_error:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
