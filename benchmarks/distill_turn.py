"""Compare rollouts dealt over the ranks of a sequence group with rollouts made by each of them.

`python benchmarks/distill_turn.py [--ranks 2 4] [--frames 16] [--cycles 1]`: cycles of CCCCCS of a
small SANA-WM student with P clips in a sequence group of P gloo processes, taken in two ways by the
same processes, turn by turn:

  replicated  each rank rolls out all P clips, as SANA-WM's public code does under context
              parallelism; the gradients of chunks are dealt over ranks
  dealt       each rank rolls out a clip of its own, and one all-to-all turns clips into frames

In both the score networks hold T/P frames of all clips, and losses must be equal, or the benchmark
fails. Every process holds whole weights, so sharding, which both ways share, costs nothing here.
What is compared is CPU seconds summed over ranks, the work; the ratio of times is the same where
every rank has a core. Theory: with R FLOPs in rollouts and S in the rest of a cycle, counted on one
device for the same turns, the ratio is (P R + S) / (R + S); of SANA-WM at T = 121 it is 1.76 at
P = 4. Collectives and bytes are those of the busiest rank in one turn, against formulas: a clip of
T frames of b bytes costs a rank (T - T/P) b in each all-to-all of the dealt way, a pass of a score
network is what one bare pass of it sends. Exit code 1 below `--least` at the largest P.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel.comm import Traffic
from parallel.degrees import MeshDegrees
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence, SequenceShard, WholeClip, make_sequence
from parallel.transpose import Share
from wm_train.config.compose import compose
from wm_train.config.curriculum import StagePlan, plan_stage
from wm_train.config.roles import CRITIC, STUDENT, turn_of
from wm_train.models.examples import example_conditions, example_latents
from wm_train.models.flops import OPERATORS
from wm_train.models.spec import WorldModel
from wm_train.objectives import distribution_matching as matching
from wm_train.objectives import student_rollouts as rollouts
from wm_train.parity.case import ParityCase
from wm_train.parity.processes import join, leave, run_processes
from wm_train.parity.turns import take, wake

WAYS = ("replicated", "dealt")
CYCLE = "CCCCCS"
DEALING = ("transpose", "gather")  # verbs that carry clips and gradients; the rest is of networks


def replicated(sequence: SequenceShard, clips: int) -> Share:
    """Return all clips, and this rank's chunks of them."""
    (member,) = sequence.comm.members
    return Share(range(clips), member.index, member.size)


@contextmanager
def way(name: str) -> Iterator[None]:
    """Take turns in one of the two ways."""
    dealing = rollouts.share_of if name == "dealt" else replicated
    with patch.object(rollouts, "share_of", dealing):
        yield


def one_turn(
    plan: StagePlan, case: ParityCase, networks: dict[str, WorldModel], step: int, view: object
) -> Tensor:
    """Take a turn with its gradients; return its losses."""
    turn = turn_of(CYCLE, step)
    networks[turn.role].zero_grad()
    output = take(plan, case, networks, turn, view)  # type: ignore[arg-type]
    for piece in output.pieces or [output.loss.sum()]:
        (piece / case.batch).backward()
    return output.loss.detach()


def work(
    degrees: MeshDegrees, rank: int, folder: Path, plan: StagePlan, case: ParityCase, cycles: int
) -> None:
    """Take the turns of some cycles both ways; write CPU seconds of each turn, losses, and what one
    turn of each kind sends."""
    mesh = join(degrees, rank, folder)
    assert mesh.comm is not None, "a sequence group has two ranks or more"
    networks, traffic = wake(plan, case), mesh.comm.traffic
    view = partial(make_sequence, mesh=mesh, kernels=case.kernels, exchange=case.exchange)
    found: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    for step in range(-1, cycles * len(CYCLE)):  # step -1, a turn of the critic, warms up
        for name in WAYS if step % 2 else WAYS[::-1]:
            traffic.collectives.clear()
            traffic.sent.clear()
            dist.barrier()
            began = time.process_time()
            with way(name):
                loss = one_turn(plan, case, networks, max(step, 0), view)
            if step >= 0:
                seconds[name].append(time.process_time() - began)
                losses[name].append(loss)
                at = f"{name}/{turn_of(CYCLE, step).role}"
                found |= {f"{at}/{kind}": x for kind, x in sent(traffic).items()}
    for name in WAYS:
        found[f"{name}/seconds"] = torch.tensor(seconds[name], dtype=torch.float64)
        found[f"{name}/losses"] = torch.stack(losses[name])
    traffic.collectives.clear()
    traffic.sent.clear()
    bare_pass(case, networks[CRITIC], view)
    found |= {f"pass/{kind}": x for kind, x in sent(traffic).items()}
    leave(found, rank, folder)


def sent(traffic: Traffic) -> dict[str, Tensor]:
    """Return kind and direction -> (collectives, bytes), kind being dealing, mean or network."""
    found: dict[str, Tensor] = {}
    for label, count in traffic.collectives.items():
        verb, direction = label.split("/")[-1].split(" ")
        kind = "dealing" if verb in DEALING else "mean" if verb == "mean" else "network"
        row = torch.tensor([count, traffic.sent[label]])
        key = f"{kind}/{direction}"
        found[key] = found.get(key, torch.zeros_like(row)) + row
    return found


def bare_pass(case: ParityCase, network: WorldModel, view: partial[WholeClip]) -> None:
    """Pass all clips once through a score network, with gradients."""
    sequence = view(ClipLayout(case.frames))
    latents = example_latents(case.model.needs(), case.shape, case.seed)
    latents = latents[:, sequence.frames.start : sequence.frames.stop]
    conditions = example_conditions(case.model.needs(), case.shape, case.seed)
    network(latents, torch.full(latents.shape[:2], 0.5), conditions, sequence).sum().backward()


def counted_flops(plan: StagePlan, case: ParityCase, cycles: int) -> tuple[float, float]:
    """Return the FLOPs of rollouts and of the rest of these cycles, of one clip on one device."""
    networks, in_rollouts = wake(plan, case), 0.0
    counter = FlopCounterMode(display=False, custom_mapping=OPERATORS)
    real = matching.make_rollouts

    def watched(*given: object) -> object:
        nonlocal in_rollouts
        before = counter.get_total_flops()
        made = real(*given)  # type: ignore[arg-type]
        in_rollouts += counter.get_total_flops() - before
        return made

    with counter, patch.object(matching, "make_rollouts", watched):
        for step in range(cycles * len(CYCLE)):
            one_turn(plan, case, networks, step, partial(LocalSequence, kernels=case.kernels))
    return in_rollouts, counter.get_total_flops() - in_rollouts


def setting(options: argparse.Namespace) -> tuple[StagePlan, ParityCase]:
    """Return the stage and a clip of its size: toy pictures, the last stage's window and sink."""
    size = [f"model.width={options.width}", f"model.depth={options.depth}"]
    overrides = ["experiment=demo", "recipe=sana_wm", "stage=distill", *size]
    plan = plan_stage(compose(overrides), "distill")
    stage = plan.config
    case = ParityCase(
        model=stage.model,
        objective=stage.objective,
        seed=0,
        frames=options.frames,
        temporal_stride=8,
        batch=1,
        grid=options.grid,
        double=False,
        chunk_frames=stage.chunk_frames,
    )
    return plan, case


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--frames", type=int, default=16, help="latent frames of a clip")
    parser.add_argument("--grid", type=int, nargs=2, default=(6, 8), help="latent rows, columns")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--least", type=float, default=1.4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, alone = setting(options)
    rolled, rest = counted_flops(plan, alone, options.cycles)
    print(
        f"T={alone.frames}, {options.grid[0]}x{options.grid[1]} tokens a frame, width"
        f" {options.width}, depth {options.depth}, {options.cycles} cycles of {CYCLE}; rollouts are"
        f" {rolled / (rolled + rest):.0%} of the FLOPs of a clip"
    )
    ratio = 0.0
    for ranks in options.ranks:
        case = replace(alone, batch=ranks)
        degrees = MeshDegrees.from_config(
            replace(plan.config.parallel, cp=ranks), ranks, plan.config.model.needs().heads
        )
        found = run_processes(work, degrees, plan, case, options.cycles)
        first = found[0]
        torch.testing.assert_close(
            first["dealt/losses"], first["replicated/losses"], rtol=1e-4, atol=1e-6
        )
        total = {name: sum(one[f"{name}/seconds"] for one in found) for name in WAYS}
        ratio = float(total["replicated"].sum() / total["dealt"].sum())
        theory = (ranks * rolled + rest) / (rolled + rest)
        print(f"\nP={ranks}: ratio {ratio:.2f}, theory by FLOPs {theory:.2f}")
        for role in (CRITIC, STUDENT):
            of_role = [i for i in range(len(total["dealt"])) if turn_of(CYCLE, i).role == role]
            means = {name: statistics.mean(total[name][of_role].tolist()) for name in WAYS}
            each = "   ".join(f"{name} {value:6.2f} CPU s" for name, value in means.items())
            print(f"  a turn of the {role:8} {each}   {means['replicated'] / means['dealt']:.2f}")
        print_traffic(found, case, ranks)
    good = ratio >= options.least
    print(f"\nratio {ratio:.2f} at P={options.ranks[-1]}, at least {options.least}: "
          f"{'good' if good else 'NOT GOOD'}")  # fmt: skip
    return 0 if good else 1


def print_traffic(found: list[dict[str, Tensor]], case: ParityCase, ranks: int) -> None:
    """Print collectives and bytes of the busiest rank beside those of the formulas."""
    held = [len(part) for part in ClipLayout(case.frames).split(ranks)]
    channels, (rows, columns) = case.model.needs().latent_channels, case.grid
    frame = channels * rows * columns * 4
    there = [(case.frames - own) * frame for own in held]  # [1, T] to frames of P clips
    back = [(ranks - 1) * own * frame for own in held]  # frames of P clips to [1, T]
    gathered = max(ranks * own * frame * (ranks - 1) for own in held)  # all clips' g to all ranks
    passes = {(CRITIC, "forward"): 1, (CRITIC, "backward"): 1, (STUDENT, "forward"): 2}

    def most(name: str) -> tuple[int, int]:
        cells = [one[name] for one in found if name in one] or [torch.zeros(2, dtype=torch.int64)]
        count, size = torch.stack(cells).amax(0).tolist()
        return count, size

    for name in WAYS:
        for role in (CRITIC, STUDENT):
            expected = {
                ("dealt", CRITIC): (1, max(there)),
                ("dealt", STUDENT): (2, max(a + b for a, b in zip(there, back, strict=True))),
                ("replicated", CRITIC): (0, 0),
                ("replicated", STUDENT): (1, gathered),
            }[name, role]
            got = most(f"{name}/{role}/dealing/forward")
            print(f"  {name:10} {role:8} clips and g: {got[0]} collectives, {got[1]} bytes;"
                  f" formula {expected[0]}, {expected[1]}")  # fmt: skip
            for direction in ("forward", "backward"):
                times, at = passes.get((role, direction), 0), f"network/{direction}"
                got, one = most(f"{name}/{role}/{at}"), most(f"pass/{at}")
                print(f"  {name:10} {role:8} {direction}: {got[0]} collectives, {got[1]} bytes;"
                      f" {times} passes {times * one[0]}, {times * one[1]}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
