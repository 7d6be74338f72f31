"""Compare one device with the mesh for one stage, and print the tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data_shards.time_layout import layout_of_frames, time_of
from parallel.degrees import MeshDegrees
from wm_train.backends import get_backend
from wm_train.config.curriculum import StagePlan
from wm_train.config.registry import builder
from wm_train.models.spec import build_model
from wm_train.parity.case import ParityCase, not_exercised, on_one_device, on_virtual_ranks
from wm_train.parity.compare import Comparison, Outcome, compare
from wm_train.parity.traffic import TrafficRow
from wm_train.parity.turns import prove_turns

DEFAULT_STRIDE = 8  # raw frames per latent when the data set is not there to ask


def prove(
    plan: StagePlan, case: ParityCase, degrees: MeshDegrees, options: argparse.Namespace
) -> int:
    """Run one comparison and print its tables, or one for each kind of turn; return 0 on success,
    else 1."""
    if case.objective.several_networks():
        return prove_turns(plan, case, degrees, options)
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


def case_of(plan: StagePlan, options: argparse.Namespace, degrees: MeshDegrees) -> ParityCase:
    """Build the case of a stage, at its full length. Raises ValueError for broken settings."""
    stage = plan.config
    time = layout_of_frames(stage.frames, DEFAULT_STRIDE)
    if Path(stage.data.path).is_dir():
        from data_shards.storage.read import open_dataset

        time = time_of(open_dataset(stage.data.path).info)
    with torch.device("meta"):
        build_model(stage.model)  # raises what is wrong before anything runs
    builder(stage.objective)  # the same
    data_ranks = degrees.dp_replicate * degrees.dp_shard
    case = ParityCase(
        model=stage.model,
        objective=stage.objective,
        seed=plan.seed,
        chunk_frames=stage.chunk_frames,
        frames=options.frames or time.latents(time.nearest(stage.frames)),
        temporal_stride=time.stride,
        grouped=time.layout == "grouped",
        batch=-(-max(options.batch, 2) // data_ranks) * data_ranks,
        grid=options.grid,
        double=options.double,
        checkpoint=options.checkpoint,
        engine=plan.backend.kernels,
        attention=plan.backend.attention,
        exchange=stage.parallel.attention_exchange,
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
