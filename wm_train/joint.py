"""Evaluate all pools of a run together as one model: `python -m wm_train.joint --config
resolved.json`.

The launch command runs it as workers when the pools of a stage have ended. Every noise level is
given to the pool that trained it: the held-out loss level by level, and rollouts that switch at the
boundaries (Wan2.2; MoWorld §3). Results are in `<out>/<name>/joint/<stage>`. One stage alone is
judged here too, for `python -m wm_train.evaluate`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

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
from wm_train.evaluation.samples import roll_out, show_samples
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
    states: dict[float, EvaluationState] = {}
    losses: dict[str, float] = {}
    stage: Stage | None = None
    steps = 0
    pools = {pool: pool_run(run, pool) for pool in run.pools}
    for pool, lowest in boundaries(pools, run.stage).items():
        own = plan_stage(pools[pool], run.stage)
        stage = open_stage(own, backend, world)
        states[lowest], done = load_state(own, stage, world)
        steps = max(steps, done)
        losses |= held_out_loss(stage, states[lowest])
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
        sampled = roll_out(whole, states, progress)
        if sampled is not None:
            show_samples(whole, sampled, folder, tracker, progress)
            if whole.config.trainer.evaluate:
                evaluate_samples(whole, sampled, steps, folder, tracker, progress)
    finally:
        if tracker:
            tracker.close()


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
