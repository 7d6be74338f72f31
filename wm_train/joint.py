"""Evaluate all pools of a run together as one model: `python -m wm_train.joint --config
resolved.json`.

The launch command runs it as workers when the pools of a stage have ended. Every noise level is
given to the pool that trained it: the held-out loss level by level, and rollouts that switch at the
boundaries (Wan2.2; MoWorld §3). Results are in `<out>/<name>/joint/<stage>`. One stage alone is
judged here too, for `python -m wm_train.evaluate`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from wm_train.backends.protocol import Backend
from wm_train.checkpoint import store
from wm_train.config.curriculum import StagePlan, plan_stage, stage_directory
from wm_train.config.pools import JOINT, boundaries
from wm_train.config.schema import RunConfig
from wm_train.config.typed import from_json
from wm_train.console import Progress
from wm_train.errors import SetupError
from wm_train.evaluation.checkpoints import judge_checkpoints, load_weights
from wm_train.evaluation.held_out import held_out_loss
from wm_train.evaluation.judge import FOLDER, evaluate_samples, record_later
from wm_train.evaluation.samples import Expert, roll_out, show_samples
from wm_train.resilience.preemption import StopRequest
from wm_train.storage import read_regular
from wm_train.tracking.rows import to_line
from wm_train.tracking.tracker import Tracker, subject_of
from wm_train.training.stage import Stage, open_stage
from wm_train.training.state import EvaluationState, build_for_evaluation
from wm_train.worker import main as worker_main
from wm_train.world import World


def judge(
    run: RunConfig, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Evaluate the newest checkpoints of all pools at the stage named `run.stage`, over the mesh of
    `run`.

    Errors: SetupError when a pool has no checkpoint.
    """
    joint = plan_stage(replace(run, pool=JOINT), run.stage)
    folder = joint.directory
    losses: dict[str, float] = {}
    stage: Stage | None = None
    steps, loads = 0, dict[float, Callable[[], EvaluationState]]()
    pools = {pool: pool_run(run, pool) for pool in run.pools}
    order = boundaries(pools, run.stage)
    guidance = [pools[pool].recipe.stages[run.stage].sampler.guidance for pool in order]
    if any(weights.keys() != joint.config.sampler.guidance.keys() for weights in guidance):
        raise SetupError(
            f"joint evaluation: got pools guided by {[list(weights) for weights in guidance]},"
            f" expected the run's {list(joint.config.sampler.guidance)}, whose weights alone a pool"
            f" may change (key recipe.stages.{run.stage}.sampler.guidance). Fix: the same names"
        )
    for pool, lowest in order.items():
        own = plan_stage(pools[pool], run.stage)
        stage = open_stage(own, backend, world)
        state, done = load_state(own, stage, world)
        steps = max(steps, done)
        losses |= held_out_loss(stage, state)
        loads[lowest] = partial(_loaded, own, stage, world)
        del state  # before the next one is loaded
    assert stage is not None, "the launch command checks that pools make all noise levels"
    by_level = {name: loss for name, loss in losses.items() if name != "validation_loss"}
    if by_level:
        losses["validation_loss"] = sum(by_level.values()) / len(by_level)
    whole = replace(stage, plan=joint)
    tracker = None
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(to_line(losses))
        tracker = Tracker(joint, folder, 0, progress.say, world.size)
        tracker.step(steps, losses)
        progress.say("joint " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    try:
        sampled = roll_out(whole, resident_experts(whole, loads), progress, guidance)
        if sampled is not None:
            show_samples(whole, sampled, folder, tracker, progress)
            if whole.config.trainer.evaluate:
                evaluate_samples(whole, sampled, steps, folder, tracker, progress)
    finally:
        if tracker:
            tracker.close()


def _loaded(own: StagePlan, stage: Stage, world: World) -> EvaluationState:
    return load_state(own, stage, world)[0]


def resident_experts(
    stage: Stage, loads: Mapping[float, Callable[[], EvaluationState]]
) -> dict[float, Expert]:
    """Return the experts by their boundaries: one in memory at a time where a sampler passes whole
    clips from high noise to low; all where each chunk needs all of them, again and again."""
    sampler = stage.config.sampler
    if sampler.chunked() or sampler.windows():
        return {lowest: load() for lowest, load in loads.items()}
    held: dict[float, EvaluationState] = {}
    return {lowest: OneAtATime(lowest, load, held) for lowest, load in loads.items()}


@dataclass(frozen=True)
class OneAtATime:
    """Hold an expert that is loaded when it is called, in the place of the one before.

    held: at most one loaded expert by its boundary, shared by all.
    """

    lowest: float
    load: Callable[[], EvaluationState]
    held: dict[float, EvaluationState]

    def model(self, *given: Any) -> Tensor:
        """Return the expert's velocity; arguments as for any `WorldModel`."""
        if self.lowest not in self.held:
            self.held.clear()
            gc.collect()  # a sharded module refers to itself
            self.held[self.lowest] = self.load()
        out: Tensor = self.held[self.lowest].model(*given)
        return out

    def averaged(self) -> AbstractContextManager[None]:
        """Return an empty context, as the loaded weights are already the averaged ones."""
        return nullcontext()


def judge_stage(
    run: RunConfig, backend: Backend, world: World, progress: Progress, stop: StopRequest
) -> None:
    """Judge the newest checkpoint of the stage named `run.stage` alone, as `wm_train.evaluate` asks
    for, on every rank. Raises SetupError without one, and for what the user must change."""
    plan = plan_stage(run, run.stage)
    found = judge_checkpoints(open_stage(plan, backend, world), plan.directory, progress)
    if world.rank == 0:
        record_later(subject_of(run, run.stage), plan.directory, found)
        print((plan.directory / FOLDER / "report.md").read_text(encoding="utf-8"))


def pool_run(run: RunConfig, pool: str) -> RunConfig:
    """Return the run of `pool` as it was started, its stage on the mesh of `run`. Raises SetupError
    when it was never started."""
    file = stage_directory(replace(run, pool=pool), run.stage) / "config.json"
    try:
        own = from_json(read_regular(file).decode())
    except OSError as error:
        raise SetupError(
            f"joint evaluation: got {error}, expected the config of pool {pool}. Fix: train the"
            " pool first"
        ) from error
    mesh = run.recipe.stages[run.stage].parallel
    stages = {**own.recipe.stages}
    stages[run.stage] = replace(stages[run.stage], parallel=mesh)
    return replace(own, recipe=replace(own.recipe, stages=stages))


def load_state(own: StagePlan, stage: Stage, world: World) -> tuple[EvaluationState, int]:
    """Load the weights of a pool's newest checkpoint, averaged if stored; return them and their
    step."""
    newest = store.find_newest(own.checkpoints, world, lambda line: None)
    if newest is None:
        raise SetupError(
            f"joint evaluation: got no valid checkpoint in {own.checkpoints}, expected one of pool"
            f" {own.pool}. Fix: train the pool first"
        )
    folder, manifest = newest
    state = build_for_evaluation(own, stage.mesh.fsdp, stage.backend.device)
    load_weights(state, folder, manifest)
    return state, manifest.step


if __name__ == "__main__":
    sys.exit(worker_main(work=judge))
