"""Does a trained model follow the camera? Held-out clips rolled out along their own path and along
another clip's, and how near each rollout is to the truth.

`python benchmarks/own_path.py RUN/STAGE [--clips 16] [--steps 20]`: RUN/STAGE is a finished stage's
folder; its newest checkpoint's averaged weights are used. PSNR is of pixels, against the decoded
latents, the mean over frames; the first is given and not counted. The frozen first frame stands
beside it. Both rollouts start from the same noise. `--sheet FILE.png` draws some clips: the truth,
the own path, the other path. Standard errors are over clips.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from camera_matters import held_out, other_videos, trained_model

from data_shards.codecs import decode_shown, make_codec
from data_shards.loading.load import denormalise
from data_shards.storage.read import open_dataset
from data_shards.time_layout import time_of
from parallel.layout import ClipLayout
from parallel.reference import Kernels
from parallel.sequence import LocalSequence
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.config.typed import from_json
from wm_train.evaluation.first_frame import in_words, over_clips
from wm_train.evaluation.metrics.pictures import by_frame, psnr
from wm_train.evaluation.pictures import write_png
from wm_train.noise import NoiseKey
from wm_train.sampling.experts import experts_of
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.sample import SampleStart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="data set, if it moved")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, help="steps of the sampler, if not the stage's")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    run = from_json((options.folder / "config.json").read_text())
    stage = run.recipe.stages[run.stage]
    model = trained_model(stage.model, options.folder)
    dataset = open_dataset(options.data or stage.data.path)
    info = dataset.info
    time = time_of(info)
    frames = time.latents(stage.frames)
    batch = held_out(dataset, options.split, options.clips, frames)
    own = Conditions.of(
        (info.image_height, info.image_width),
        info.temporal_stride,
        batch.c2w,
        batch.intrinsics,
        grouped=time.layout == "grouped",
    )
    (partner,) = other_videos([dataset.find(key).episode for key in batch.keys], 1)
    other = own.with_fields(c2w=batch.c2w[partner], intrinsics=batch.intrinsics[partner])
    levels = sampling_levels(
        options.steps or stage.trainer.sample_steps, stage.objective.sampling_shift()
    )
    codec = make_codec(info.codec, info.codec_options)

    def videos(latents: torch.Tensor) -> list[np.ndarray]:
        return [
            decode_shown(codec, denormalise(clip, info).float().numpy(), info) for clip in latents
        ]

    @torch.no_grad()
    def rolled_out(conditions: Conditions) -> list[np.ndarray]:
        start = SampleStart(
            experts_of(model),
            batch.latents[:, 0],
            conditions,
            levels,
            NoiseKey(1, "own_path"),
            batch.draws,
            LocalSequence(ClipLayout(frames)),
            Kernels(),
        )
        return videos(builder(stage.sampler)(start, stage.sampler))

    truth, followed, strayed = videos(batch.latents), rolled_out(own), rolled_out(other)
    rows = [
        [
            float(by_frame(true[1:], video[1:], psnr).mean())
            for video in (right, wrong, np.repeat(true[:1], len(true), 0))
        ]
        for true, right, wrong in zip(truth, followed, strayed, strict=True)
    ]
    print(f"{options.folder}: {options.clips} {options.split} clips, {stage.frames} frames")
    print("clip                     own path  another's  frozen first frame, dB")
    for key, (right, wrong, still) in zip(batch.keys, rows, strict=True):
        print(f"{key:<24} {right:8.2f} {wrong:10.2f} {still:10.2f}")
    for name, column in zip(("own path", "another's", "frozen"), zip(*rows, strict=True)):
        print(f"{name:<12} {in_words(over_clips(column))} dB")
    gains = [(right - still, right - wrong) for right, wrong, still in rows]
    above_still, above_wrong = (in_words(over_clips(column)) for column in zip(*gains, strict=True))
    better = sum(gain > 0 for _, gain in gains)
    print(f"own path above frozen {above_still} dB, above another's {above_wrong} dB")
    print(f"own path better than another's for {better} of {len(rows)} clips")
    if options.sheet:
        picks = np.linspace(0, len(truth[0]) - 1, 6).round().astype(int)
        rows_of = zip(truth[:4], followed, strayed, strict=False)
        clips = [np.concatenate([one[picks] for one in three], axis=1) for three in rows_of]
        picture = np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips])
        write_png(options.sheet, picture)


if __name__ == "__main__":
    main()
