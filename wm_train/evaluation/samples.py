"""Roll out held-out clips from their first frame and camera path, to be judged by eye."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data_shards.codecs import decode_shown, make_codec
from data_shards.loading.load import Batch, denormalise
from data_shards.time_layout import time_of
from wm_train.config.registry import builder
from wm_train.config.schema import StageConfig
from wm_train.console import Progress
from wm_train.evaluation.first_frame import clip_psnr, summary, verdict
from wm_train.evaluation.held_out import fetch_held_out, parts_of
from wm_train.evaluation.pictures import contact_sheet, side_by_side, write_png, write_video
from wm_train.sampling.experts import Experts, Model
from wm_train.sampling.guidance import Guidance
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.sample import SampleStart
from wm_train.tracking.tracker import Tracker
from wm_train.training.data import batch_parts, conditions_of, first_latents, sequence_of
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState

SHEET_CLIPS = 4  # clips on the contact sheet


class Expert(Protocol):
    """Hold weights that make samples: a model, and a context in which they are averaged."""

    @property
    def model(self) -> Model: ...

    def averaged(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Sampled:
    """Hold the first validation clips and what the model made of them, on every rank.

    keys: of the clips, in order; truth, made: normalised latents [B, T, C, h, w] on the host; c2w
    [B, F, 4, 4] and intrinsics [B, F, 4] in pixels of the decoded pictures, None without cameras;
    control_rows: [B, T, A], amounts in units of their spread, None without.
    """

    keys: tuple[str, ...]
    truth: torch.Tensor
    made: torch.Tensor
    c2w: torch.Tensor | None
    intrinsics: torch.Tensor | None
    control_rows: torch.Tensor | None = None


def roll_out(
    stage: Stage,
    state: TrainState | Mapping[float, Expert],
    progress: Progress,
    guidance: Sequence[Guidance] = (),
) -> Sampled | None:
    """Roll out `trainer.samples` validation clips with the averaged weights.

    Every rank must call this, as the model is sharded. state: of one model, or of experts by the
    noise level from which each is used; guidance: of each expert, in falling order of these; None:
    one that was trained on part of the noise only makes no samples alone, and without validation
    clips there are none.
    """
    noise = stage.config.objective.noise_range()
    if isinstance(state, TrainState) and noise != (0.0, 1.0):
        return None
    wanted = min(stage.config.trainer.samples, len(stage.dataset.clips("validation")))
    if not wanted:
        return None
    steps = f"{len(levels_of(stage.config)) - 1} steps, {stage.config.sampler.name}"
    progress.say(f"sampling {wanted} held-out clips of {stage.config.frames} frames in {steps}")
    batch, latents = sample(stage, state, wanted, guidance)
    rows = stage.world.gather(list(batch.keys))[:: stage.mesh.sequence_size]
    beside = [batch.c2w, batch.intrinsics, batch.fields.get("controls")]
    return Sampled(
        tuple(key for row in rows for key in row)[:wanted],
        whole_clips(stage, batch.latents)[:wanted],
        whole_clips(stage, latents)[:wanted],
        *(None if one is None else whole_fields(stage, one)[:wanted] for one in beside),
    )


def show_samples(
    stage: Stage, sampled: Sampled, folder: Path, tracker: Tracker | None, progress: Progress
) -> None:
    """Write an MP4 of each clip, one contact sheet and `psnr.json`, how near to the truth samples
    and the frozen first frame are, to `<folder>/samples/`, on the rank with a tracker.

    The truth is the decoded latents, the upper bound of any sample.
    """
    if tracker is None:
        return
    target = folder / "samples"
    target.mkdir(exist_ok=True)
    given = time_of(stage.dataset.info).first
    clips, rows = [], []
    for key, truth, made in zip(sampled.keys, sampled.truth, sampled.made, strict=True):
        clips.append((decode(stage, truth), decode(stage, made)))
        rows.append(clip_psnr(*clips[-1], stage.dataset.info.fps, given))
        path = target / f"{key}.mp4"
        write_video(path, side_by_side(*clips[-1]), stage.dataset.info.fps)
        tracker.artifact(path)
    figures = summary(rows)
    by_clip = dict(zip(sampled.keys, rows, strict=True))
    means = {name: one.as_json() for name, one in figures.items()}
    (target / "psnr.json").write_text(json.dumps({"mean": means, "clips": by_clip}, indent=1))
    write_png(target / "contact_sheet.png", contact_sheet(clips[:SHEET_CLIPS]))
    for name in ("psnr.json", "contact_sheet.png"):
        tracker.artifact(target / name)
    progress.say(verdict(figures))
    progress.say(f"samples: {target.absolute() / 'contact_sheet.png'} (truth above, sample below)")


def sample(
    stage: Stage,
    state: TrainState | Mapping[float, Expert],
    wanted: int,
    guidance: Sequence[Guidance] = (),
) -> tuple[Batch, torch.Tensor]:
    """Return this rank's rows and frames of the first `wanted` validation clips, and their samples.

    All ranks make equally many forward passes, of no more clips at once than in training. With
    `stream` each rank of a sequence group makes the same whole clip, as a chunk is too short to be
    split, and returns its own frames.
    """
    batch = fetch_held_out(stage, wanted)[1]
    assert batch is not None, "the caller counts the held-out clips"
    states: dict[float, Expert] = (
        {0.0: state} if isinstance(state, TrainState) else dict(sorted(state.items(), reverse=True))
    )
    models = tuple(one.model for one in states.values())
    experts = Experts(tuple(states), models, tuple(guidance))
    sampler = stage.config.sampler
    parts = parts_of(stage, wanted)
    with ExitStack() as contexts, torch.no_grad():
        for one in states.values():
            contexts.enter_context(one.averaged())
        if sampler.chunked():
            contexts.enter_context(uncompiled(stage))
        made = [
            builder(sampler)(
                SampleStart(
                    experts,
                    first_latents(stage, part),
                    conditions_of(stage, part),
                    levels_of(stage.config),
                    stage.noise,
                    part.draws,
                    sequence_of(stage, part),
                    stage.kernels,
                    clean_first=stage.config.model.needs().image == "frame",
                ),
                sampler,
            )
            for part in batch_parts(batch, parts)
        ]
    return batch, torch.cat(made)


def levels_of(stage: StageConfig) -> list[float]:
    """Return the sigmas of the stage's sampler, including the 0 at the end."""
    levels, shift = stage.sampler.levels, stage.sampler.shift
    levels = stage.trainer.sample_steps if levels is None else levels
    return sampling_levels(levels, stage.objective.sampling_shift() if shift is None else shift)


def uncompiled(stage: Stage) -> AbstractContextManager[object]:
    """Return a context in which compiled blocks run eagerly: compiling them for the shapes of
    chunks takes longer than the few passes that use them."""
    if not stage.config.parallel.compile:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def whole_clips(stage: Stage, local: torch.Tensor) -> torch.Tensor:
    """Gather [b, T/P, C, h, w] of every rank into [B, T, C, h, w] on the host, in the order of the
    global batch."""
    parts = stage.world.gather_tensors(local)
    size = stage.mesh.sequence_size
    return torch.cat(
        [torch.cat(parts[start : start + size], dim=1) for start in range(0, len(parts), size)]
    )


def whole_fields(stage: Stage, local: torch.Tensor) -> torch.Tensor:
    """Gather a field [b, ...] that all ranks of a sequence group have whole into [B, ...] on the
    host."""
    return torch.cat(stage.world.gather_tensors(local)[:: stage.mesh.sequence_size])


def decode(stage: Stage, latents: torch.Tensor) -> np.ndarray:
    """Decode normalised latents [T, C, h, w] into a video [F, H, W, 3] uint8."""
    info = stage.dataset.info
    codec = make_codec(info.codec, info.codec_options)
    return decode_shown(codec, denormalise(latents, info).float().numpy(), info)
