"""Prove a stage of several networks: every kind of turn at every exit step, on one device and on
virtual ranks.

Each network wakes with its own seed: with a critic that equals the teacher the score difference is
zero, and nothing would be proven.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from parallel.degrees import MeshDegrees
from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence, WholeClip
from parallel.streaming import chunk_starts
from parallel.virtual import VirtualComm, replicate, run_virtual
from wm_train.config.curriculum import StagePlan
from wm_train.config.registry import builder
from wm_train.config.roles import STUDENT, Turn
from wm_train.models.examples import example_conditions, example_latents
from wm_train.noise import PARITY, NoiseKey
from wm_train.objectives.clips import Clips, ObjectiveOutput, RoleTurn
from wm_train.objectives.score_levels import turn_choice
from wm_train.parity.case import ParityCase, make_model
from wm_train.parity.compare import Outcome, compare

MOST_TURNS = 1000  # among which every exit is drawn


def prove_turns(
    plan: StagePlan, case: ParityCase, degrees: MeshDegrees, options: argparse.Namespace
) -> int:
    """Compare every kind of turn, and print a line for each; return 0 on success, else 1."""
    tolerance = options.tolerance or (1e-9 if case.double else 1e-5)
    networks = wake(plan, case)
    print(
        f"{plan.run}: {case.objective.name}, {case.batch} clips of {case.frames} latent frames,"
        f" {'float64' if case.double else 'float32'} on {case.device}\none device against"
        f" {degrees.cp} virtual ranks (ring {degrees.ring} x ulysses {degrees.ulysses})\n"
    )
    failed = 0
    for turn, exit_step in turns_to_prove(plan):
        reference = on_one_device(plan, case, networks, turn)
        outcome = on_virtual_ranks(plan, case, networks, turn, degrees)
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


def wake(plan: StagePlan, case: ParityCase) -> dict[str, nn.Module]:
    """Return the networks by role, each with seeded weights of its own."""
    found: dict[str, nn.Module] = {STUDENT: make_model(case)}
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
    networks: dict[str, nn.Module],
    turn: Turn,
    comm: VirtualComm | None,
) -> tuple[ObjectiveOutput, Tensor]:
    """Run one turn on one device or one member; return its output and the sum to
    back-propagate."""
    stage, chunks = plan.config, {STUDENT: plan.config.chunk_frames}
    chunks |= {role: own.chunk_frames for role, own in stage.roles.items()}
    sequences: dict[str, WholeClip] = {}
    for role, size in chunks.items():
        layout = ClipLayout(case.frames, chunk_starts=chunk_starts(case.frames, size))
        sequences[role] = (
            GroupSequence(layout, comm, case.kernels, exchange=case.exchange)
            if comm
            else LocalSequence(layout, case.kernels)
        )
    conditions = example_conditions(case.model.needs(), case.shape, case.seed)
    held = {name: value.to(case.device) for name, value in conditions.fields.items()}
    if "text" in held:
        held["text"] = held["text"].to(case.dtype)
    null = None if "text" not in held else torch.zeros_like(held["text"][0])
    conditions = replace(conditions, fields=held, null_text=null)
    latents = example_latents(case.model.needs(), case.shape, case.seed)
    latents, frames = latents.to(case.device, case.dtype), sequences[STUDENT].frames
    draws, key = torch.arange(case.batch, device=case.device), NoiseKey(case.seed, PARITY)
    local = latents[:, frames.start : frames.stop]
    clips = Clips(local, draws, conditions, sequences[STUDENT], key)
    assert stage.distill is not None, "checked before the start"
    given = RoleTurn(turn, stage.distill, sequences, latents[:, 0], case.kernels)
    output: ObjectiveOutput = builder(case.objective)(networks, clips, case.objective, given)
    if output.pieces is None:
        return output, output.loss.sum() / case.batch
    return output, torch.stack([piece / case.batch for piece in output.pieces]).sum()


def on_one_device(
    plan: StagePlan, case: ParityCase, networks: dict[str, nn.Module], turn: Turn
) -> Outcome:
    """Return loss and gradients of a turn on one device."""
    model = networks[turn.role]
    model.zero_grad()
    output, total = take(plan, case, networks, turn, None)
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.loss.detach(), None, gradients)


def on_virtual_ranks(
    plan: StagePlan,
    case: ParityCase,
    networks: dict[str, nn.Module],
    turn: Turn,
    degrees: MeshDegrees,
) -> Outcome:
    """Return loss and summed gradients of a turn over the virtual ranks of a sequence group."""
    copies = replicate(networks[turn.role], degrees.cp)

    def body(comm: VirtualComm) -> tuple[Tensor, Tensor]:
        mine = {**networks, turn.role: copies[comm.members[0].index]}
        output, total = take(plan, case, mine, turn, comm)
        return output.loss, total

    results, _ = run_virtual(body, degrees.ring, degrees.ulysses)
    torch.stack([total for _, total in results]).sum().backward()
    gradients: dict[str, Tensor] = {}
    for copy in copies:  # in rank order
        for name, parameter in copy.named_parameters():
            if parameter.grad is not None:
                before = gradients.get(name)
                gradients[name] = parameter.grad if before is None else before + parameter.grad
    return Outcome(results[0][0].detach(), None, gradients)
