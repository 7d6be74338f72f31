"""Does a trained model use keys and mouse? Held-out loss of each clip with its own controls, with
another clip's and with none; and whether rollouts turn with the mouse.

`python benchmarks/controls_matter.py RUN/STAGE [--clips 32] [--rollouts 32] [--sheet FILE]`: RUN/
STAGE is a finished stage's folder; its newest checkpoint's averaged weights are used. All cases see
the same noise, at the objective's own held-out levels, so that differences are paired. A turn is a
latent frame in which the mouse moves by at least its spread over the data set; it is followed when
the picture shifts the other way (wm_train/evaluation/metrics/turns.py). Rollouts start from the
clip's first latent. "Permuted" rollouts are given another clip's controls and judged by the clip's
own mouse: what a model would reach that looks at the picture alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from camera_matters import held_out, other_videos, trained_model
from torch import Tensor

from data_shards.codecs import decode_shown, make_codec
from data_shards.loading.load import denormalise
from data_shards.storage.read import open_dataset
from data_shards.time_layout import time_of
from parallel.layout import ClipLayout
from parallel.reference import REFERENCE
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.config.typed import from_json
from wm_train.evaluation.metrics.turns import mouse_column, turns_followed
from wm_train.evaluation.pictures import contact_sheet, write_png
from wm_train.evaluation.samples import levels_of
from wm_train.noise import VALIDATION, NoiseKey
from wm_train.objectives.clips import Clips
from wm_train.sampling.experts import Experts
from wm_train.sampling.sample import SampleStart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", help="data set, if it moved")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=32, help="clips to roll out; 0: none")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    run = from_json((options.folder / "config.json").read_text())
    stage = run.recipe.stages[run.stage]
    model = trained_model(stage.model, options.folder)
    dataset = open_dataset(options.data or stage.data.path)
    info, time = dataset.info, time_of(dataset.info)
    frames = time.latents(stage.frames)
    layout = ClipLayout(frames, chunk_starts=chunk_starts(frames, stage.chunk_frames))
    sequence = LocalSequence(layout)
    batch = held_out(dataset, "validation", options.clips, frames)
    (partner,) = other_videos([dataset.find(key).episode for key in batch.keys], 1)
    size = (info.image_height, info.image_width)
    grouped = time.layout == "grouped"
    own = Conditions(size, time.stride, dict(batch.fields), grouped=grouped)
    controls = batch.fields["controls"]
    permuted = own.with_fields(controls=controls[partner])
    none = replace(own, controls_keep=torch.zeros(options.clips, dtype=torch.bool))

    @torch.no_grad()
    def losses(seen: Conditions, sigma: float) -> Tensor:
        """Return the loss of each clip, [clips]."""
        config = stage.objective.held_out(sigma)
        clips = Clips(batch.latents, batch.draws, seen, sequence, NoiseKey(1, VALIDATION))
        loss: Tensor = builder(config)(model, clips, config).loss
        return loss

    total = {name: torch.zeros(options.clips) for name in ("own", "permuted", "none")}
    levels = stage.objective.held_out_levels()
    for sigma in levels:
        found = {"own": own, "permuted": permuted, "none": none}
        at = {name: losses(seen, sigma) for name, seen in found.items()}
        words = ", ".join(f"{name} {value.mean():.4f}" for name, value in at.items())
        better = (at["own"] < at["permuted"]).float().mean()
        print(f"sigma {sigma}: {words}; own below permuted in {better:.1%} of clips", flush=True)
        for name, value in at.items():
            total[name] += value / len(levels)
    share = (total["own"] < total["permuted"]).float().mean()
    words = ", ".join(f"{name} {value.mean():.4f}" for name, value in total.items())
    print(f"held-out loss of {options.clips} clips: {words}; own below permuted in {share:.1%}")

    column = mouse_column(info.control_names)
    if not options.rollouts or column is None:
        return
    codec = make_codec(info.codec, info.codec_options)

    @torch.no_grad()
    def rolled_out(seen: Conditions) -> list[np.ndarray]:
        start = SampleStart(
            Experts((0.0,), (model,)),
            batch.latents[:, 0],
            seen,
            levels_of(stage),
            NoiseKey(1, "controls_matter"),
            batch.draws,
            sequence,
            REFERENCE,
        )
        return decoded(builder(stage.sampler)(start, stage.sampler))

    def decoded(latents: Tensor) -> list[np.ndarray]:
        return [
            decode_shown(codec, denormalise(one, info).float().numpy(), info) for one in latents
        ]

    few = slice(0, options.rollouts)
    batch = replace(batch, latents=batch.latents[few], draws=batch.draws[few])
    own, permuted = (
        seen.with_fields(**{name: value[few] for name, value in seen.fields.items()})
        for seen in (own, permuted)
    )
    mouse = controls[few, :, column].double().numpy()
    truth, made = decoded(batch.latents), rolled_out(own)
    for name, videos in (
        ("decoded truth", truth),
        ("rollouts", made),
        ("permuted", rolled_out(permuted)),
    ):
        scores = [
            turns_followed(video, row, time) for video, row in zip(videos, mouse, strict=True)
        ]
        turns = sum(score.n for score in scores)
        right = sum((score.value or 0.0) * score.n for score in scores)
        print(f"{name}: the picture turns with the mouse in {right / turns:.1%} of {turns} turns")
    if options.sheet:
        write_png(options.sheet, contact_sheet(list(zip(truth, made, strict=True))[:8]))


if __name__ == "__main__":
    main()
