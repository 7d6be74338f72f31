"""One process of the samplers' tests: `sample_worker.py <config> <folder>` saves what it sampled,
once with clips spread over the processes and once with the frames of each clip (`parallel.cp`).

The model's output head starts away from zero, else no velocity would depend on anything.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from wm_train.backends import get_backend
from wm_train.config.curriculum import StagePlan, plan_stage
from wm_train.config.typed import from_json
from wm_train.evaluation.samples import sample
from wm_train.models.init import Rule
from wm_train.models.sana_wm.model import SanaWM
from wm_train.training.stage import Stage, open_stage
from wm_train.training.state import TrainState, build_state
from wm_train.worker import end_process
from wm_train.world import World, join_world


class Awake(SanaWM):
    """SANA-WM with small numbers where a new one has zeros."""

    def initial_rule(self, name, shape):
        rule = super().initial_rule(name, shape)
        zero = rule is not None and rule.kind == "constant" and rule.scale == 0.0
        return Rule("normal", 0.1) if zero else rule and replace(rule, zero_rows=())


def open_awake(plan: StagePlan, world: World) -> tuple[Stage, TrainState]:
    """Return the stage and its state before the first step, awake."""
    from wm_train.training import state

    before = state.build_model
    stage = open_stage(plan, get_backend("cpu"), world)
    state.build_model = Awake
    try:
        return stage, build_state(plan, stage.mesh.fsdp, stage.backend.device)
    finally:
        state.build_model = before


def main() -> None:
    run = from_json(Path(sys.argv[1]).read_text())
    world = join_world(get_backend("cpu"), 60.0)
    for cp in (1, world.size):
        plan = plan_stage(run, run.stage)
        parallel = replace(plan.config.parallel, cp=cp)
        own = replace(plan, config=replace(plan.config, parallel=parallel))
        stage, state = open_awake(own, world)
        _, latents = sample(stage, state, 2)
        torch.save(latents, Path(sys.argv[2]) / f"cp{cp}_rank{world.rank}.pt")
    world.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
