"""Prove the mesh: `python -m wm_train.parity stage=3 parallel.ulysses=2 parallel.ring=2`.

Builds the configured model and objective, runs loss, output and every parameter's gradient on one
device and over the mesh, and compares. The mesh is ring x ulysses virtual ranks in this process
(the sequence mesh, real algorithms), or with --processes real gloo processes with FSDP2
(launcher.workers of them). Every pool is proven with its own overrides; pool=<name> takes one of
them. Exit code 0: equal within the tolerance; 1: not equal, or a parameter is not exercised; 2: the
arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.screen import print_result
from parallel.degrees import MeshDegrees, sequence_size
from wm_train.config.compose import DEMO_LINE, compose, is_demo
from wm_train.config.curriculum import StagePlan, plan_stage, select
from wm_train.config.pools import pool_runs
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import RunConfig
from wm_train.redact import clean_output


@clean_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.parity",
        description=(__doc__ or "").split("\n\n", 2)[1],
        allow_abbrev=False,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="as for wm_train.launch, e.g. stage=3 parallel.ulysses=2 parallel.ring=2",
    )
    parser.add_argument(
        "--processes", action="store_true", help="gloo processes and FSDP2 instead of virtual ranks"
    )
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative error of any tensor (default 1e-5, with --double 1e-9)",
    )
    parser.add_argument("--frames", type=int, help="latent frames (default: the stage's)")
    parser.add_argument("--batch", type=int, default=2, help="clips; every second one is shorter")
    parser.add_argument(
        "--grid", type=grid, default=(4, 4), metavar="4x4", help="latent rows x columns"
    )
    parser.add_argument(
        "--checkpoint", help="a checkpoint directory (step_N) instead of seeded weights"
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder of your own with the groups of configs/"
    )
    parser.add_argument("--worst", type=int, help="print only this many rows, the worst first")
    options = parser.parse_intermixed_args(list(sys.argv[1:] if arguments is None else arguments))
    if is_demo(options.overrides):
        print(DEMO_LINE)
    from wm_train.parity.prove import case_of, prove  # torch, which --help does without

    try:
        config = compose(options.overrides, options.config_dir)
        runs = pool_runs(config, options.overrides, options.config_dir)
        pools = {pool: first_stage(run) for pool, run in runs.items()}
        if options.checkpoint and len(pools) > 1:
            problem = Problem(
                "--checkpoint",
                f"one for {len(pools)} pools",
                "the pool that it is of",
                f"pool={next(iter(pools))}",
            )
            raise ConfigError([problem])
        meshes = {pool: degrees_of(run, options.processes) for pool, run in pools.items()}
        cases = {pool: case_of(run, options, meshes[pool]) for pool, run in pools.items()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return max(prove(run, cases[pool], meshes[pool], options) for pool, run in pools.items())


def first_stage(config: RunConfig) -> StagePlan:
    """Return the first selected stage, with its own mesh and model."""
    return plan_stage(config, select(config.recipe, config.stage)[0])


def grid(text: str) -> tuple[int, int]:
    """Parse a grid: "4x6" -> (4, 6)."""
    rows, columns = text.split("x")
    return int(rows), int(columns)


def degrees_of(plan: StagePlan, processes: bool) -> MeshDegrees:
    """Return the mesh to prove: that of all processes, or one sequence group of virtual ranks.

    Raises ValueError for a mesh that launch would refuse.
    """
    wanted, needs = plan.config.parallel, plan.config.model.needs()
    if processes:
        workers = plan.launcher.workers
        return MeshDegrees.from_config(wanted, workers, needs.heads, needs.key_heads)
    alone, size = replace(wanted, dp_replicate=1, dp_shard=1), sequence_size(wanted)
    return MeshDegrees.from_config(alone, size, needs.heads, needs.key_heads)


if __name__ == "__main__":
    sys.exit(print_result(main))
