"""Predict the memory of a stage with several networks, one kind of turn at a time.

All states are there in every turn: weights, optimizer and average of what trains, weights in the
compute type of what does not. Gradients and saved activations are those of the one network whose
turn it is: of a student one chunk, at any length of the clip, or with `distill.gradient=packed` its
part of one clip and the keys and values of the clean frames; of a critic its part of the clips. The
others run without gradients and need room for one block. Not counted: the rollout's latents and the
past of its chunks, which `distill.history_states=replay` does not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from parallel.sharding import PRECISIONS
from wm_train.config.roles import STUDENT
from wm_train.config.schema import StageConfig
from wm_train.plan.memory import ClipShape, Memory, clean_bytes, stage_memory


def turn_memory(
    stage: StageConfig, shape: ClipShape, whole: int, shards: int, with_activations: bool = True
) -> dict[str, Memory]:
    """Return the memory of one rank in a turn of each trained network, by role; with_activations as
    for `stage_memory`.

    shape: the part of a clip that score networks hold on a rank; whole: latent frames of a clip;
    shards: over how many ranks each network is sharded. Raises ValueError as `stage_memory` does.
    """
    chunk = min(
        stage.chunk_frames + 1, whole
    )  # a rank makes whole chunks, the first is the longest
    bare = replace(stage, roles={}, distill=None)
    if stage.distill and stage.distill.gradient == "packed" and with_activations:
        one_clip = replace(shape, clips=1)
        student = stage_memory(bare, one_clip, shards)
        kept = clean_bytes(stage.model, one_clip, stage.parallel.precision)
        alone = {STUDENT: replace(student, activations=student.activations + kept)}
    else:
        alone = {
            STUDENT: stage_memory(bare, replace(shape, frames=chunk), shards, with_activations)
        }
    for role, own in stage.roles.items():
        optimizer = own.optimizer or stage.optimizer
        one = replace(bare, model=own.model, optimizer=optimizer, frozen=())
        alone[role] = stage_memory(one, shape, shards, with_activations)
        if own.optimizer is None:
            width = PRECISIONS[stage.parallel.precision].itemsize
            alone[role] = _frozen(alone[role], width, shards)
    trained = [STUDENT, *(role for role, own in stage.roles.items() if own.optimizer)]
    return {role: _turn(alone, role) for role in trained}


def job_memory(stage: StageConfig, shape: ClipShape, shards: int) -> Memory:
    """Return the memory of one rank while a teacher makes the stage's trajectories, before anything
    trains. Arguments as for `turn_memory`."""
    job = stage.trajectories
    assert job is not None, "the caller looks"
    bare = replace(stage, trajectories=None, model=job.teacher.model, frozen=())
    width = PRECISIONS[stage.parallel.precision].itemsize
    return _frozen(stage_memory(bare, replace(shape, clips=job.batch), shards), width, shards)


def _frozen(memory: Memory, width: int, shards: int) -> Memory:
    """Return the memory of a network that is only asked, its weights `width` bytes each."""
    return replace(
        memory,
        weights=width * memory.parameters // shards,
        trained=0,
        gradients=0,
        optimizer=0,
        average=0,
        activations=0,
        staging=0,
    )


def _turn(alone: Mapping[str, Memory], role: str) -> Memory:
    """Return the memory in a turn of one of these networks."""
    every, own = list(alone.values()), alone[role]

    def total(name: str) -> int:
        return sum(int(getattr(memory, name)) for memory in every)

    def most(name: str) -> int:
        return max(int(getattr(memory, name)) for memory in every)

    return replace(
        own,
        parameters=total("parameters"),
        trained=total("trained"),
        weights=total("weights"),
        optimizer=total("optimizer"),
        average=total("average"),
        staging=total("staging"),
        gathered=most("gathered"),
        busy=most("busy"),
    )
