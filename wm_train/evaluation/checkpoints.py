"""Judge the newest checkpoints of a stage that is not being trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import Manifest
from wm_train.console import Progress
from wm_train.errors import SetupError
from wm_train.evaluation import results
from wm_train.evaluation.judge import FOLDER, evaluate_samples
from wm_train.evaluation.samples import roll_out
from wm_train.storage import Place
from wm_train.training.stage import Stage
from wm_train.training.state import EvaluationState, build_for_evaluation


def judge_checkpoints(stage: Stage, folder: Path, progress: Progress) -> dict[str, Any]:
    """Judge the newest checkpoint, and before it the one before, if `trainer.before` and nobody has
    judged an earlier one yet; return the results of the newest. Every rank must call this.

    Raises SetupError without a checkpoint, or for a stage that samples nothing.
    """
    world, plan = stage.world, stage.plan
    newest = store.find_newest(plan.checkpoints, world, progress.say)
    if newest is None:
        raise SetupError(
            f"evaluate: got no valid checkpoint in {plan.checkpoints}, expected one. Fix: train the"
            " stage first"
        )
    place, manifest = newest
    known = world.from_first(results.earlier(folder / FOLDER, manifest.step) is not None)
    if stage.config.trainer.before and not known:
        older = store.find_newest(plan.checkpoints, world, progress.say, before=manifest.step)
        if older is not None:
            judge_one(stage, *older, folder, progress, False)
    return judge_one(stage, place, manifest, folder, progress, True)


def judge_one(
    stage: Stage, place: Place, manifest: Manifest, folder: Path, progress: Progress, draw: bool
) -> dict[str, Any]:
    """Load a checkpoint's averaged weights, roll out and judge."""
    state = build_for_evaluation(stage.plan, stage.mesh.fsdp, stage.backend.device)
    load_weights(state, place, manifest)
    sampled = roll_out(stage, {0.0: state}, progress)
    if sampled is None:
        raise SetupError(
            "evaluate: got a data set without validation clips, expected some. Fix: encode more"
            " episodes"
        )
    return evaluate_samples(stage, sampled, manifest.step, folder, None, progress, draw)


def load_weights(state: EvaluationState, place: Place, manifest: Manifest) -> None:
    """Load the averaged weights of a checkpoint, or the weights where no average is stored, of the
    student where several networks have trained."""
    targets = state.sources(manifest.tensors)
    own_names = {name.partition("/")[2] for name in targets}
    stored = manifest.tensors
    kinds = {n: n.partition("/")[0] for n in stored}
    unread = {n for n in stored if n.partition("/")[2] in own_names}
    unread |= {
        n for n, kind in kinds.items() if kind not in ("model", "ema")
    }  # others' and moments
    store.load(place, manifest, targets, may_ignore=unread)
