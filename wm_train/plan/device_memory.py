"""Predict the memory of a stage on a device: from a rehearsal of its step, or where none can be
made, by formula."""

from __future__ import annotations

import sys
from dataclasses import replace

from parallel.degrees import sequence_size
from parallel.layout import split_evenly
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.roles import STUDENT
from wm_train.config.schema import StageConfig
from wm_train.plan.depth import shallow
from wm_train.plan.kept import Job, deep_rehearsals
from wm_train.plan.latents import Frame
from wm_train.plan.memory import ClipShape, Memory, stage_memory
from wm_train.plan.rehearsal import ReadsOnHost, Rehearsal
from wm_train.plan.turns import turn_memory


def can_rehearse(stage: StageConfig) -> bool:
    """Return False where the state is held by DeepSpeed or on the host, which no rehearsal shows.
    Activations on the host are those of the rehearsal, what recomputation keeps among them."""
    return stage.parallel.sharding == "fsdp" and stage.parallel.offload_state == "none"


def turn_memories_of(
    plan: StagePlan, frame: Frame, device: str, processes: int = 1
) -> tuple[dict[str, Memory], tuple[int, int, int], dict[str, Rehearsal]]:
    """Return the memory of one rank in a turn of each trained network, by role; its (clips, latent
    frames, latent frames of the whole clip); and the rehearsals behind it, empty where none can be
    made. Errors: those of `clip_shape`."""
    stage, (shape, sizes) = plan.config, clip_shape(plan, frame)
    shards = plan.launcher.workers // stage.parallel.dp_replicate
    made = rehearsals_of(plan, frame, device, processes) if can_rehearse(stage) else {}
    if stage.roles:
        turns = turn_memory(stage, shape, sizes[2], shards, not made)
    else:
        turns = {STUDENT: stage_memory(stage, shape, shards, not made)}
    for role, one in made.items():
        turns[role] = with_rehearsal(turns[role], one)
    return turns, sizes, made


def clip_shape(plan: StagePlan, frame: Frame) -> tuple[ClipShape, tuple[int, int, int]]:
    """Return what one rank holds of clips at once, and that as (clips, latent frames, latent frames
    of the whole clip). Raises ConfigError for frames that do not fill latents."""
    stage = plan.config
    time = frame.time(stage.frames)
    if not time.fits(stage.frames):
        key = f"recipe.stages.{plan.stage}.frames"
        fix = f"{key}={time.nearest(stage.frames)}"
        raise ConfigError([Problem(key, str(stage.frames), f"{time.rule} of the latents", fix)])
    whole = time.latents(stage.frames)
    size = sequence_size(stage.parallel)
    clips = -(-clips_of_rank(plan) // micro_batches(plan))
    held = len(split_evenly(whole, size)[0])
    sides = (frame.channels, frame.height, frame.width)
    shape = ClipShape(clips, held, *sides, frame.temporal_stride, grouped=time.layout == "grouped")
    return shape, (clips, held, whole)


def clips_of_rank(plan: StagePlan) -> int:
    """Return the clips, or packed rows, of a step that one rank takes, whole or with its group."""
    groups = plan.launcher.workers // sequence_size(plan.config.parallel)
    return -(-plan.config.global_batch // groups)


def micro_batches(plan: StagePlan) -> int:
    """Return in how many parts a rank takes its clips, as `wm_train/training/data.py` does."""
    config = plan.config
    return clips_of_rank(plan) if config.rows_apart() else config.trainer.accumulate


def rehearsals_of(
    plan: StagePlan, frame: Frame, device: str, processes: int = 1
) -> dict[str, Rehearsal]:
    """Return a rehearsal of the first rank for each trained network, by role; empty, with a line on
    standard error, where the stage's own code reads values on the host."""
    try:
        return {
            role: deep_rehearsals([plan], frame, role, device, processes)[0]
            for role in trained_roles(plan)
        }
    except ReadsOnHost as error:
        print(
            f"stage {plan.stage}: memory by formula, as a step cannot be rehearsed: it reads"
            f" {error} on the host",
            file=sys.stderr,
        )
        return {}


def trained_roles(plan: StagePlan) -> list[str]:
    """Return the networks that have turns in a stage."""
    return [STUDENT, *(role for role, own in plan.config.roles.items() if own.optimizer)]


def jobs_of(plan: StagePlan, frame: Frame, device: str) -> list[Job]:
    """Return the rehearsals that `turn_memories_of` will ask for. Errors: as there."""
    clip_shape(plan, frame)
    parts = shallow(plan) if can_rehearse(plan.config) else []
    return [Job(part, frame, role, device) for role in trained_roles(plan) for part in parts]


def with_rehearsal(memory: Memory, made: Rehearsal) -> Memory:
    """Return the memory with what a rehearsal saw on the device; where the optimizer's step needs
    more than the gradients' part, what it needs besides is added to what is busy."""
    seen = made.at_peak
    stepping = max(0, made.update - sum(seen.values()))
    return replace(
        memory,
        weights=seen.get("weights", 0),
        optimizer=seen.get("optimizer", 0),
        average=seen.get("average", 0),
        gradients=seen.get("gradients", 0),
        gathered=seen.get("gathered", 0) + seen.get("communication", 0),
        activations=seen.get("activations", 0) + seen.get("build", 0),
        busy=seen.get("backward", 0) + stepping,
    )
