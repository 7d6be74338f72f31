"""Is a few-step student as good as its teacher? Held-out clips rolled out by both and compared with
the truth, beside the first frame frozen.

`python benchmarks/student_and_teacher.py RUN/distill --teacher RUN/sft [--clips 16] [--steps 20]`:
folders of finished stages, whose newest averaged weights are used. The student samples as its stage
names it, the teacher in `--steps` Euler steps. All figures are of pixels against the decoded
latents, without the given first frame; each stands with its standard error over videos.

  PSNR        over the clip and second by second
  motion      rms difference of neighbouring frames, over the truth's
  drift       contrast (standard deviation) of the last second over that of the first second, over
              the truth's
  diversity   rms difference of two noises

Exit code 1 unless the student's PSNR is at most 1 dB below the teacher's, its motion 0.7 to 1.4 of
the truth's, and its diversity at least half the teacher's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from camera_matters import held_out, trained_model

from data_shards.codecs import make_codec
from data_shards.loading.load import Batch, denormalise
from data_shards.schema import DatasetInfo
from data_shards.storage.read import open_dataset
from data_shards.time_layout import time_of
from parallel.layout import ClipLayout
from parallel.reference import Kernels
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.conditioning import Conditions
from wm_train.config.registry import builder
from wm_train.config.schema import StageConfig
from wm_train.config.typed import from_json
from wm_train.evaluation.first_frame import over_clips
from wm_train.evaluation.metrics.pictures import psnr
from wm_train.evaluation.metrics.score import Summary
from wm_train.evaluation.pictures import write_png
from wm_train.noise import NoiseKey
from wm_train.sampling.experts import experts_of
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.sample import SampleStart

MOST_LOST_DB, MOTION, LEAST_DIVERSITY = 1.0, (0.7, 1.4), 0.5
Video = np.ndarray  # [F, H, W, 3] uint8


@torch.no_grad()
def rolled_out(
    folder: Path, stage: StageConfig, batch: Batch, info: DatasetInfo, steps: int, noise: str
) -> list[Video]:
    """Return samples of a stage's newest weights, one by one, as its sampler makes them."""
    levels = stage.sampler.levels
    camera = {"c2w": batch.c2w, "intrinsics": batch.intrinsics}
    size = (info.image_height, info.image_width)
    layout = ClipLayout(batch.frames, chunk_starts=chunk_starts(batch.frames, stage.chunk_frames))
    model = trained_model(stage.model, folder)
    found = []
    for row in range(len(batch.keys)):
        own = {name: None if x is None else x[row : row + 1] for name, x in camera.items()}
        start = SampleStart(
            experts_of(model),
            batch.latents[row : row + 1, 0],
            Conditions.of(size, info.temporal_stride, **own),
            sampling_levels(levels or steps, stage.objective.sampling_shift()),
            NoiseKey(1, f"student_and_teacher/{noise}"),
            batch.draws[row : row + 1],
            LocalSequence(layout),
            Kernels(),
        )
        found += decoded(builder(stage.sampler)(start, stage.sampler), info)
    return found


def decoded(latents: torch.Tensor, info: DatasetInfo) -> list[Video]:
    codec = make_codec(info.codec, info.codec_options)
    return [codec.decode(denormalise(clip, info).float().numpy()) for clip in latents]


def rms(x: Video) -> float:
    return float(np.sqrt(np.mean(np.square(x.astype(np.float64)))))


def contrast_kept(video: Video, fps: int) -> float:
    return float(video[-fps:].std() / video[1 : fps + 1].std())


def shown(name: str, cell: Summary) -> str:
    """Return a column: a mean and its standard error, which one clip alone has not."""
    error = "     " if cell.standard_error is None else f"+- {cell.standard_error:.2f}"
    return f"  {name} {cell.mean:7.2f} {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", help="data set, if it moved")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="draw some clips: truth, student, teacher")
    options = parser.parse_args()
    stages = {}
    for name, folder in (("student", options.folder), ("teacher", options.teacher)):
        run = from_json((folder / "config.json").read_text())
        stages[name] = (folder, run.recipe.stages[run.stage])
    dataset = open_dataset(options.data or run.data.path)
    info, student = dataset.info, stages["student"][1]
    frames = time_of(info).latents(student.frames)
    batch = held_out(dataset, "validation", options.clips, frames)
    truth, fps = decoded(batch.latents, info), round(info.fps)
    made = {
        name: [rolled_out(folder, stage, batch, info, options.steps, noise) for noise in ("a", "b")]
        for name, (folder, stage) in stages.items()
    }
    made["frozen"] = [[np.repeat(clip[:1], len(clip), 0) for clip in truth]] * 2
    spans = {"clip": slice(1, None)}
    for second in range((len(truth[0]) - 1) // fps):
        spans[f"second {second + 1}"] = slice(1 + second * fps, 1 + (second + 1) * fps)
    print(f"{options.clips} held-out clips of {student.frames} frames, {options.steps} steps")
    figures: dict[tuple[str, str], list[float]] = {}
    for name, (videos, others) in made.items():
        pairs = list(zip(truth, videos, others, strict=True))
        for span, part in spans.items():
            figures[f"PSNR, {span}", name] = [psnr(t[part], v[part]) for t, v, _ in pairs]
        moved = [(rms(np.diff(v.astype(int), axis=0)), rms(np.diff(t.astype(int), axis=0)))
                 for t, v, _ in pairs]  # fmt: skip
        figures["motion", name] = [mine / its for mine, its in moved]
        figures["drift", name] = [
            contrast_kept(v, fps) / contrast_kept(t, fps) for t, v, _ in pairs
        ]
        figures["diversity", name] = [
            rms(v[1:].astype(int) - o[1:].astype(int)) for _, v, o in pairs
        ]
    for row in dict.fromkeys(row for row, _ in figures):
        cells = (shown(name, over_clips(figures[row, name])) for name in made)
        print(f"{row:<16}" + "".join(cells))
    if options.sheet:
        picks = np.linspace(0, len(truth[0]) - 1, 8).round().astype(int)
        rows = [clip[picks] for place in range(3) for clip in
                (truth[place], made["student"][0][place], made["teacher"][0][place])]  # fmt: skip
        write_png(
            options.sheet, np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        )
    means = {key: float(np.mean(values)) for key, values in figures.items()}
    lost = means["PSNR, clip", "teacher"] - means["PSNR, clip", "student"]
    held = means["PSNR, clip", "student"] - means["PSNR, clip", "frozen"]
    kept = means["diversity", "student"] / max(means["diversity", "teacher"], 1e-9)
    moves = means["motion", "student"]
    good = lost <= MOST_LOST_DB and MOTION[0] <= moves <= MOTION[1] and kept >= LEAST_DIVERSITY
    print(
        f"student below teacher {lost:.2f} dB (at most {MOST_LOST_DB}), motion {moves:.2f} of the"
        f" truth's ({MOTION[0]} to {MOTION[1]}), diversity {kept:.2f} of the teacher's (at least"
        f" {LEAST_DIVERSITY}); above the frozen frame {held:.2f} dB:"
        f" {'good' if good else 'NOT GOOD'}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
