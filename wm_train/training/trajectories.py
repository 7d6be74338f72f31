"""Make the trajectories that a few-step student starts from: a data job at the start of its stage.

A frozen teacher follows the flow of every clip, from keyed noise and the clip's first frame to the
clean end, by Euler steps under guidance; the states at the student's levels and the end become the
member `ode` of a data set of their own, the number that keys the noise the member `ode_start`
(CausVid's protocol; WorldScape §2.3). A bidirectional teacher denoises a clip as a whole; a causal
one chunk by chunk, each with the ends of those before as its past (Causal-Forcing).

A shard is the unit of work. The processes of the stage deal the missing ones among themselves, so
the job goes on after a kill, also in another number of processes, and when the data set is complete
it ends at once. Clips of a pass are fixed by the shard, so its bytes do not depend on either.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_shards.encoding.derived import (
    Arrays,
    Derived,
    begin,
    choose_clips,
    finish_derived,
    is_complete,
    write_derived,
)
from data_shards.loading.batch import Batch
from data_shards.loading.whole import read_batch
from data_shards.schema import ClipEntry, DataError
from wm_train.backends.protocol import Backend
from wm_train.checkpoint.manifest import committed
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import TEACHER, TrajectoriesConfig
from wm_train.console import Progress
from wm_train.models.spec import WorldModel, build_model
from wm_train.objectives.ode_regression import START
from wm_train.resilience.preemption import Preempted, StopRequest
from wm_train.training.data import on_device
from wm_train.training.networks import find_weights, load_weights_
from wm_train.training.solve import solve
from wm_train.training.stage import Stage, open_stage
from wm_train.training.state import build_for_evaluation
from wm_train.world import World

T = TypeVar("T")
SAY_EVERY_S = 30.0  # between lines of progress


def make_trajectories(
    plan: StagePlan, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Make the data set that the stage trains on, as far as it is not there. Every rank must call
    this.

    Errors: SetupError without a teacher; DataError for clips that cannot be read, a folder that
    cannot be written, or one that holds trajectories of another teacher, solver or clips; Preempted
    when asked to stop, with all finished shards kept.
    """
    job, config = plan.of_trajectories(), plan.config.trajectories
    assert config is not None, "the caller looks"
    stage = open_stage(job, backend, world)
    teacher, where = job.of_role(TEACHER), f"recipe.stages.{plan.stage}.trajectories.teacher"
    source = teacher.source
    assert source is not None, "checked before the start: a teacher has a source"
    gone = not committed(source.checkpoints) and not (source.checkpoints / "config.json").is_file()
    if world.from_first(gone and is_complete(plan.config.data.path)):
        progress.say("trajectories: taken as they are, since their teacher is no longer there")
        return
    with torch.device("meta"):
        names = build_model(teacher.config.model)
    found = find_weights(teacher, names, f"{where}.inherit", world, progress.say)
    most = {"train": config.clips, "validation": config.held_out}
    shards = choose_clips(stage.dataset, stage.latent_frames, most, plan.seed, config.shard_clips)
    facts = trajectory_facts(plan, config, found.digest)
    derived = Derived(stage.dataset, plan.config.data.path, stage.latent_frames, shards, facts)
    missing = _from_first(world, lambda: begin(derived))
    if missing is None:
        progress.say(f"trajectories: {plan.config.data.path} is complete")
        return
    network = build_for_evaluation(teacher, stage.mesh.fsdp, backend.device).model
    load_weights_(network, find_weights(teacher, network, where, world, lambda line: None), where)
    clips = sum(map(len, shards))
    progress.say(
        f"trajectories of {clips} clips ({len(missing)} of {len(shards)} shards to make), by the"
        f" teacher of {', '.join(map(str, found.places))} -> {plan.config.data.path}"
    )
    stop.work_from_here()
    members, began = stage.mesh.data_size, time.monotonic()
    said = began
    for at in range(0, len(missing), members):
        dealt = missing[at : at + members]
        make_shards(stage, network, derived, dealt, config, stop)
        now, done = time.monotonic(), at + len(dealt)
        if now - said > SAY_EVERY_S or done == len(missing):
            left = (now - began) / done * (len(missing) - done)
            progress.say(
                f"trajectories: {done} of {len(missing)} shards, {now - began:.0f} s,"
                f" {left:.0f} s left"
            )
            said = now
    levels = plan.config.objective.trajectory_levels()
    _from_first(
        world, lambda: finish_derived(derived, ode_levels=levels, trajectories=derived.facts)
    )
    stop.all_saved("asked to stop before the first step: the trajectories are made")


def trajectory_facts(
    plan: StagePlan, config: TrajectoriesConfig, teacher: str
) -> dict[str, str | float | list[float]]:
    """Return what trajectories are made with, as dataset.json states it. teacher: the digest of its
    weights."""
    model = json.dumps(asdict(config.teacher.model), sort_keys=True)
    weights = {f"guidance.{name}": weight for name, weight in sorted(config.guidance.items())}
    return {
        "teacher": teacher,
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "chunk_frames": config.teacher.chunk_frames,
        "levels": list(plan.config.objective.trajectory_levels()),
        "steps": config.steps,
        "shift": config.shift,
        **weights,
        "seed": plan.seed,
        "batch": config.batch,
        "shard_clips": config.shard_clips,
        "dtype": config.dtype,
        "precision": plan.config.parallel.precision,
    }


def make_shards(
    stage: Stage,
    teacher: WorldModel,
    derived: Derived,
    dealt: Sequence[int],
    config: TrajectoriesConfig,
    stop: StopRequest,
) -> None:
    """Make one shard on each data-parallel member, as far as there are any. A sharded teacher needs
    equally many passes everywhere: who has fewer clips passes some again, and keeps nothing of
    it."""
    mesh, world = stage.mesh, stage.world
    mine = dealt[min(mesh.data_index, len(dealt) - 1)]
    parts, problem = list[Batch](), None
    try:
        parts = [read_part(stage, part) for part in passes(derived.shards[mine], config.batch)]
    except DataError as error:
        problem = error
    _raise_together(world, problem)
    most = max(len(passes(derived.shards[number], config.batch)) for number in dealt)
    added: list[Arrays] = []
    for place in range(most):
        part = on_device(stage, parts[min(place, len(parts) - 1)])
        states = solve(stage, teacher, part, config).cpu().numpy()
        if place < len(parts):
            added += [members_of(*one, config.dtype) for one in zip(part.draws.tolist(), states)]
        if stop.agreed(world):
            raise Preempted("asked to stop: all finished shards of trajectories are kept")
    if mesh.data_index < len(dealt) and mesh.sequence_index == 0:
        try:
            write_derived(derived, mine, added)
        except OSError as error:
            problem = DataError(
                f"trajectories: cannot write to {derived.out} ({error}). Fix: make room there, and"
                " start again: what is made is kept"
            )
        except DataError as error:
            problem = error
    _raise_together(world, problem)


def passes(clips: Sequence[ClipEntry], size: int) -> list[Sequence[ClipEntry]]:
    """Return the clips of each pass of the teacher."""
    return [clips[at : at + size] for at in range(0, len(clips), size)]


def read_part(stage: Stage, clips: Sequence[ClipEntry]) -> Batch:
    """Read this rank's frames of the clips of a pass, each with the number that keys its noise."""
    frames, numbers = stage.latent_frames, [own_number(stage.plan.seed, c.key) for c in clips]
    held = stage.mesh.frames(frames)
    whole = stage.mesh.sequence_index == 0
    return read_batch(stage.dataset, clips, frames, (held.start, held.stop), numbers, whole)


def own_number(seed: int, key: str) -> int:
    """Return the number that keys the start of a clip's trajectory, 63 bits of seed and key."""
    digest = hashlib.sha256(f"{START.stage}/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def members_of(number: int, states: NDArray[np.float32], dtype: str) -> Arrays:
    """Return the members of a clip with these states, [T, K, C, h, w]."""
    start = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    return {"ode.npy": (dtype, states), "ode_start.npy": ("uint8", start)}


def _from_first(world: World, what: Callable[[], T]) -> T:
    """Return what rank 0 finds, on every rank, or raise its DataError on every rank."""
    found, problem = None, None
    if world.rank == 0:
        try:
            found = what()
        except DataError as error:
            problem = error
    _raise_together(world, problem)
    value: T = world.from_first(found)
    return value


def _raise_together(world: World, problem: DataError | None) -> None:
    """Raise the first problem of all ranks on every rank."""
    mine = None if problem is None else [str(problem), problem.passing]
    for found in world.gather(mine):
        if found is not None:
            raise DataError(*found)
