"""Trace the first step of this rank of a real group.

`python step_worker.py <out.json> <role> key=value...`; the first rank writes what its tracer saw:
the operators with their bytes, and the collectives in order.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.roles import Turn
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import example_batch, open_shapes, trace_turn
from wm_train.plan.speed.collectives import gloo_copies
from wm_train.plan.tracing import Tracer
from wm_train.training.networks import build_networks
from wm_train.world import World

FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)


def main(out: Path, role: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    plan = plan_stages(compose(words))[0]
    dist.init_process_group("gloo", rank=rank, world_size=size)
    stage, tracer = open_shapes(plan, FRAME, World(rank, size)), Tracer(inside=gloo_copies)
    state = build_networks(plan, stage.mesh.fsdp, stage.backend.device)
    with tracer, tracer.resizing():
        batch = example_batch(stage, FRAME)
        made = trace_turn(stage, state, batch, Turn(role, 0), tracer)
    if rank == 0:
        work = [[phase, name, asdict(done)] for (phase, name), done in made.work.items()]
        found = {"work": work, "collectives": tracer.collectives, "held": made.held}
        found["peak"] = sum(made.at_peak.values())
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
