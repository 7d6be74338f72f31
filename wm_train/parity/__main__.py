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

import torch

from parallel.degrees import MeshDegrees, sequence_size
from wm_train.backends import get_backend
from wm_train.config.compose import DEMO_LINE, compose, is_demo
from wm_train.config.curriculum import StagePlan, plan_stage, select
from wm_train.config.pools import pool_runs
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.registry import builder
from wm_train.config.schema import RunConfig
from wm_train.models.spec import build_model
from wm_train.parity.case import ParityCase, not_exercised, on_one_device, on_virtual_ranks
from wm_train.parity.compare import Comparison, Outcome, compare
from wm_train.parity.traffic import TrafficRow

DEFAULT_STRIDE = 8  # raw frames per latent when the data set is not there to ask


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


def prove(
    plan: StagePlan, case: ParityCase, degrees: MeshDegrees, options: argparse.Namespace
) -> int:
    """Run one comparison and print its tables; return 0 on success, else 1."""
    tolerance = options.tolerance or (1e-9 if case.double else 1e-5)
    reference = on_one_device(case)
    rows: list[TrafficRow] = []
    if options.processes:
        from wm_train.parity.processes import on_processes

        outcome = on_processes(case, degrees)
    else:
        outcome, rows = on_virtual_ranks(case, degrees.ring, degrees.ulysses)
    print(title(plan, case, degrees, options.processes))
    return report(case, reference, outcome, rows, tolerance, options.worst)


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
    wanted, heads = plan.config.parallel, plan.config.model.needs().heads
    if processes:
        return MeshDegrees.from_config(wanted, plan.launcher.workers, heads)
    alone = replace(wanted, dp_replicate=1, dp_shard=1)
    return MeshDegrees.from_config(alone, sequence_size(wanted), heads)


def case_of(plan: StagePlan, options: argparse.Namespace, degrees: MeshDegrees) -> ParityCase:
    """Build the case of a stage, at its full length."""
    stage = plan.config
    stride = DEFAULT_STRIDE
    if Path(stage.data.path).is_dir():
        from data_shards.storage.read import open_dataset

        stride = open_dataset(stage.data.path).info.temporal_stride
    with torch.device("meta"):
        build_model(stage.model)  # raises what is wrong before anything runs
    builder(stage.objective)  # the same
    data_ranks = degrees.dp_replicate * degrees.dp_shard
    case = ParityCase(
        model=stage.model,
        objective=stage.objective,
        seed=plan.seed,
        chunk_frames=stage.chunk_frames,
        frames=options.frames or (stage.frames - 1) // stride + 1,
        temporal_stride=stride,
        batch=-(-max(options.batch, 2) // data_ranks) * data_ranks,
        grid=options.grid,
        double=options.double,
        checkpoint=options.checkpoint,
        engine=plan.backend.kernels,
        attention=plan.backend.attention,
        device=(
            "cpu"
            if options.processes
            else str(get_backend(plan.backend.name, plan.backend.threads).device)
        ),
    )
    _ = case.kernels  # raises if a configured engine is missing
    return case


def title(plan: StagePlan, case: ParityCase, degrees: MeshDegrees, processes: bool) -> str:
    where = (
        f"{degrees.world} processes (dp_replicate {degrees.dp_replicate} x dp_shard"
        f" {degrees.dp_shard} x ring {degrees.ring} x ulysses {degrees.ulysses}; sequence mesh and"
        " FSDP2)"
        if processes
        else (
            f"{degrees.cp} virtual ranks (ring {degrees.ring} x ulysses {degrees.ulysses}; the"
            " sequence mesh. FSDP: --processes)"
        )
    )
    valid = ", ".join(str(n) for n in case.layout.valid_frames or ())
    name = f"{plan.run}, pool {plan.pool}" if plan.pool else plan.run
    return (
        f"{name}: {case.model.name}, {case.objective.name}, {case.batch} clips of {case.frames}"
        f" latent frames ({valid} valid), {'float64' if case.double else 'float32'} on"
        f" {case.device}\none device against {where}\n"
    )


def report(
    case: ParityCase,
    reference: Outcome,
    outcome: Outcome,
    traffic: list[TrafficRow],
    tolerance: float,
    worst: int | None,
) -> int:
    """Print the tables; return 0 on success, else 1."""
    rows = compare(reference, outcome)
    width = max(len(row.name) for row in rows)
    print(f"{'tensor':{width}}  ‖reference‖  ‖Δ‖/‖reference‖")
    shown = (
        rows if worst is None else rows[:2] + sorted(rows[2:], key=lambda row: -row.error)[:worst]
    )
    for row in shown:
        print(line(row, width, tolerance))
    if traffic:
        print_traffic(traffic)
    unused, silent = not_exercised(case, reference)
    for title_, names in (
        ("declared unused by the model", unused),
        ("NOT EXERCISED: zero or no gradient", silent),
    ):
        if names:
            print(f"\n{title_} ({len(names)}): {', '.join(names)}")
    bad = [row for row in rows if not row.error <= tolerance]
    top = max(rows, key=lambda row: row.error)
    odd = [row.label for row in traffic if not row.agree]
    print(
        f"\nworst: {top.name} {top.error:.1e} (tolerance {tolerance:.0e}; {len(rows)} tensors"
        " compared)"
    )
    if bad:
        print(f"FAILED: {len(bad)} tensors differ, first {bad[0].name}")
    if silent:
        print(
            f"FAILED: {len(silent)} parameters are not exercised, so nothing is proven about them"
        )
    if odd:
        print(f"FAILED: traffic is not what the formulas say: {', '.join(odd)}")
    print("FAILED" if bad or silent or odd else "OK")
    return 1 if bad or silent or odd else 0


def line(row: Comparison, width: int, tolerance: float) -> str:
    return (
        f"{row.name:{width}}  {row.size:11.4e} "
        f" {row.error:.1e}{'' if row.error <= tolerance else '  <-- beyond tolerance'}"
    )


def print_traffic(rows: list[TrafficRow]) -> None:
    """Print counted against expected traffic; bytes are those of the rank that sends most."""
    width = max(len(row.label) for row in rows)
    print(f"\n{'traffic per step':{width}}  collectives  bytes sent  formula")
    for row in sorted(rows, key=lambda row: (row.label.rsplit(" ", 1)[1], row.label)):
        same = "equal" if row.agree else f"{row.expected[0]} collectives, {row.expected[1]} bytes"
        print(f"{row.label:{width}}  {row.counted[0]:11d}  {row.counted[1]:10d}  {same}")


if __name__ == "__main__":
    sys.exit(main())
