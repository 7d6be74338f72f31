"""Prove a stage of several networks: every kind of turn at every exit step, on one device and on
virtual ranks, or on gloo processes with FSDP2.

Each network wakes with its own seed: with a critic that equals the teacher the score difference is
zero, and nothing would be proven.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.degrees import MeshDegrees
from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence, WholeClip, make_sequence
from parallel.sharding import shard_model
from parallel.streaming import chunk_starts
from parallel.virtual import VirtualComm, replicate, run_virtual
from wm_train.config.curriculum import StagePlan
from wm_train.config.registry import builder
from wm_train.config.roles import STUDENT, Turn
from wm_train.models.examples import example_conditions, example_latents
from wm_train.models.spec import WorldModel
from wm_train.noise import PARITY, NoiseKey
from wm_train.objectives.clips import Clips, ObjectiveOutput, RoleTurn
from wm_train.objectives.score_levels import turn_choice
from wm_train.parity.case import ParityCase, make_model
from wm_train.parity.compare import Outcome, compare
from wm_train.parity.processes import (
    assemble,
    join,
    leave,
    own_rows,
    run_processes,
    whole_gradients,
)
from wm_train.training.state import backward_pieces

MOST_TURNS = 1000  # among which every exit is drawn


def prove_turns(
    plan: StagePlan, case: ParityCase, degrees: MeshDegrees, options: argparse.Namespace
) -> int:
    """Compare every kind of turn, and print a line for each; return 0 on success, else 1."""
    tolerance = options.tolerance or (1e-9 if case.double else 1e-5)
    networks, turns = wake(plan, case), list(turns_to_prove(plan))
    print(
        f"{plan.run}: {case.objective.name}, {case.batch} clips of {case.frames} latent frames,"
        f" {'float64' if case.double else 'float32'} on {case.device}\none device against"
        f" {where(degrees, options.processes)}\n"
    )
    if options.processes:
        found = run_processes(work, degrees, plan, case, [turn for turn, _ in turns])
        outcomes = (assemble(degrees, found, f"{number}/") for number in range(len(turns)))
    else:
        outcomes = (on_virtual_ranks(plan, case, networks, turn, degrees) for turn, _ in turns)
    failed = 0
    for (turn, exit_step), outcome in zip(turns, outcomes, strict=True):
        reference = on_one_device(plan, case, networks, turn)
        rows = compare(reference, outcome)
        worst = max(rows, key=lambda row: row.error)
        silent = not any(gradient.any() for gradient in reference.gradients.values())
        good = worst.error <= tolerance and not silent
        failed += not good
        print(
            f"{turn.role} at exit {exit_step}: {len(rows)} tensors, worst {worst.name}"
            f" {worst.error:.1e}{'' if good else '  <-- FAILED'}"
            f"{', no gradient' if silent else ''}"
        )
    print(f"\ntolerance {tolerance:.0e}\n{'FAILED' if failed else 'OK'}")
    return 1 if failed else 0


def where(degrees: MeshDegrees, processes: bool) -> str:
    sequence = f"ring {degrees.ring} x ulysses {degrees.ulysses}"
    if not processes:
        return f"{degrees.cp} virtual ranks ({sequence})"
    data = f"dp_replicate {degrees.dp_replicate} x dp_shard {degrees.dp_shard}"
    return f"{degrees.world} processes ({data} x {sequence}; FSDP2)"


def wake(plan: StagePlan, case: ParityCase) -> dict[str, WorldModel]:
    """Return the networks by role, each with seeded weights of its own."""
    found: dict[str, WorldModel] = {STUDENT: make_model(case)}
    for number, (role, own) in enumerate(plan.config.roles.items(), 1):
        seeded = replace(case, model=own.model, seed=case.seed + number, checkpoint=None)
        found[role] = make_model(seeded)
        found[role].requires_grad_(own.optimizer is not None)
    return found


def turns_to_prove(plan: StagePlan) -> Iterator[tuple[Turn, int]]:
    """Yield for each trained role a turn of every exit step, and that step."""
    distill, key = plan.config.distill, NoiseKey(plan.seed, PARITY)
    assert distill is not None, "checked before the start"
    steps = len(distill.levels)
    for role in (STUDENT, *(role for role, own in plan.config.roles.items() if own.optimizer)):
        if distill.exit == "last":
            yield Turn(role, 0), steps
            continue
        drawn = [turn_choice(key, f"exit/{role}", i, steps) for i in range(MOST_TURNS)]
        for exit_step in range(1, steps + 1):
            yield Turn(role, drawn.index(exit_step - 1)), exit_step


def take(
    plan: StagePlan,
    case: ParityCase,
    networks: Mapping[str, nn.Module],
    turn: Turn,
    view: Callable[[ClipLayout], WholeClip],
    rows: slice = slice(None),
) -> ObjectiveOutput:
    """Run one turn on one device or one member. view: the verbs over whole clips of this layout;
    rows: the clips of the batch that are passed here."""
    stage, chunks = plan.config, {STUDENT: plan.config.chunk_frames}
    chunks |= {role: own.chunk_frames for role, own in stage.roles.items()}
    layouts = {
        role: ClipLayout(case.frames, chunk_starts=chunk_starts(case.frames, size))
        for role, size in chunks.items()
    }
    sequences = {role: view(layout) for role, layout in layouts.items()}
    conditions = example_conditions(case.model.needs(), case.shape, case.seed)
    held = {name: value.to(case.device) for name, value in conditions.fields.items()}
    null = negative = None
    if "text" in held:
        held["text"] = text = held["text"].to(case.dtype)
        null, negative = torch.zeros_like(text[0]), -text[0]
    conditions = replace(conditions, fields=held, null_text=null, negative_text=negative).rows(rows)
    latents = example_latents(case.model.needs(), case.shape, case.seed)
    latents, frames = latents.to(case.device, case.dtype)[rows], sequences[STUDENT].frames
    draws = torch.arange(case.batch, device=case.device)[rows]
    local = latents[:, frames.start : frames.stop]
    clips = Clips(local, draws, conditions, sequences[STUDENT], NoiseKey(case.seed, PARITY))
    assert stage.distill is not None, "checked before the start"
    given = RoleTurn(turn, stage.distill, sequences, latents[:, 0], case.kernels)
    output: ObjectiveOutput = builder(case.objective)(networks, clips, case.objective, given)
    return output


def total(output: ObjectiveOutput, batch: int) -> Tensor:
    """Return the sum to back-propagate, where all pieces may be held at a time."""
    if output.pieces is None:
        return output.loss.sum() / batch
    return torch.stack([piece / batch for piece in output.pieces]).sum()


def on_one_device(
    plan: StagePlan, case: ParityCase, networks: Mapping[str, nn.Module], turn: Turn
) -> Outcome:
    """Return loss and gradients of a turn on one device."""
    model = networks[turn.role]
    model.zero_grad()
    output = take(plan, case, networks, turn, partial(LocalSequence, kernels=case.kernels))
    total(output, case.batch).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.loss.detach(), None, gradients)


def on_virtual_ranks(
    plan: StagePlan,
    case: ParityCase,
    networks: Mapping[str, nn.Module],
    turn: Turn,
    degrees: MeshDegrees,
) -> Outcome:
    """Return loss and summed gradients of a turn over the virtual ranks of a sequence group."""
    copies = replicate(networks[turn.role], degrees.cp)

    def body(comm: VirtualComm) -> tuple[Tensor, Tensor]:
        mine = {**networks, turn.role: copies[comm.members[0].index]}
        view = partial(GroupSequence, comm=comm, kernels=case.kernels, exchange=case.exchange)
        output = take(plan, case, mine, turn, view)
        return output.loss, total(output, case.batch)

    results, _ = run_virtual(body, degrees.ring, degrees.ulysses)
    torch.stack([part for _, part in results]).sum().backward()
    gradients: dict[str, Tensor] = {}
    for copy in copies:  # in rank order
        for name, parameter in copy.named_parameters():
            if parameter.grad is not None:
                before = gradients.get(name)
                gradients[name] = parameter.grad if before is None else before + parameter.grad
    return Outcome(results[0][0].detach(), None, gradients)


def work(
    degrees: MeshDegrees,
    rank: int,
    folder: Path,
    plan: StagePlan,
    case: ParityCase,
    turns: Sequence[Turn],
) -> None:
    """Run one process: shard every network, take its part of all turns, write losses and (rank 0)
    whole gradients of turn i as <i>/losses and <i>/gradient/<name>."""
    mesh = join(degrees, rank, folder)
    networks, rows = wake(plan, case), own_rows(case.batch, mesh)
    for network in networks.values():
        shard_model(network, network.units(), mesh.fsdp)
    view = partial(make_sequence, mesh=mesh, kernels=case.kernels, exchange=case.exchange)
    results: dict[str, Tensor] = {}
    for number, turn in enumerate(turns):
        model = networks[turn.role]
        model.zero_grad()
        output = take(plan, case, networks, turn, view, rows)
        if output.pieces is None:
            total(output, case.batch).backward()
        else:
            backward_pieces(model, output.pieces, output.count, 1 / case.batch)
        found = {"losses": output.loss.detach(), **whole_gradients(model, rank)}
        results |= {f"{number}/{name}": x for name, x in found.items()}
    leave(results, rank, folder)
