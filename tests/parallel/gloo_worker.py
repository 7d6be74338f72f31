"""One process of a multi-process test: python gloo_worker.py <task> <rank> <world> <folder>; its
result goes to <folder>/<rank>.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import hybrid
import oracles

from parallel.comm import Member
from parallel.compat import all_gather_single, reduce_scatter_single
from parallel.engines import make_engine
from parallel.mesh import MeshDegrees, build_mesh, sequence_comm
from parallel.sequence import GroupSequence, make_sequence
from parallel.sharding import shard_model


def grid_groups(lines: list[list[int]], ring: int, ulysses: int) -> dict[str, list[list[int]]]:
    """Axis groups of sequence groups given as lists of global ranks in member order."""
    grids = [[line[r * ulysses : (r + 1) * ulysses] for r in range(ring)] for line in lines]
    return {
        "sequence": lines,
        "ulysses": [row for grid in grids for row in grid],
        "ring": [list(column) for grid in grids for column in zip(*grid)],
    }


def run_verbs(rank: int, lines: list[list[int]], grids: list[tuple[int, int]]) -> list:
    """Every shared case on every grid -> outputs and gradients of this process's member."""
    found = []
    line = next(x for x in lines if rank in x)
    for ring, ulysses in grids:
        member = Member(*divmod(line.index(rank), ulysses), ring, ulysses)
        comm = sequence_comm(member, grid_groups(lines, ring, ulysses))
        for case in oracles.process_cases():
            sequence = GroupSequence(case.layout, comm, exchange=case.exchange)
            leaves, outputs, loss = oracles.member_run(case, sequence)
            loss.backward()
            grads = {
                n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()
            }
            found.append(({n: x.detach() for n, x in outputs.items()}, grads))
        found.append((comm.traffic.collectives, comm.traffic.sent))
    return found


VALID = (11, 8, 5, 10)


def run_fsdp(rank: int, world: int) -> list:
    """FSDP2 with a clip split over 2 processes: full gradients and losses, for every mesh of this
    world that splits clips."""
    found = []
    meshes = [MeshDegrees(1, world // 2, 1, 2)] + (
        [MeshDegrees(2, 1, 2, 1), MeshDegrees(1, 1, 2, 2)] if world == 4 else []
    )
    for degrees in meshes:
        mesh = build_mesh(degrees, "cpu")
        x = hybrid.clips()
        each = len(x) // mesh.data_size
        rows = slice(mesh.data_index * each, (mesh.data_index + 1) * each)
        for checkpointed in (False, True):
            model = hybrid.Hybrid(checkpointed)
            shard_model(model, model.blocks, mesh.fsdp)
            sequence = make_sequence(hybrid.layout(VALID[rows]), mesh)
            for _ in range(2):  # accumulated over two passes
                loss = hybrid.losses(model, x[rows], sequence).sum() / len(x) / 2
                loss.backward()
            found.append(({name: p.grad.full_tensor() for name, p in model.named_parameters()},))
        found.append(mesh.comm.traffic.collectives)
    return found


def run_streams(rank: int, world: int, grids: list[tuple[int, int]]) -> list:
    """Clips turned into frames and back, frames gathered, and two chunks of a stream, on every grid
    -> this rank's tensors."""
    found = []
    for ring, ulysses in grids:
        member = Member(*divmod(rank, ulysses), ring, ulysses)
        comm = sequence_comm(member, grid_groups([list(range(world))], ring, ulysses))
        leaf, results, loss = oracles.exchanged(comm)
        loss.backward()
        found.append({"gradient": leaf.grad, **results})
    return found


def run_engine(name: str, rank: int, world: int) -> list:
    """An engine of others and our own on the same tokens; dense attention is what both are compared
    with by the test."""
    comm = sequence_comm(Member(0, rank, 1, world), grid_groups([list(range(world))], 1, world))
    engine = make_engine(name, comm)
    found = []
    for case in oracles.engine_cases():
        for chosen in (None, engine):
            leaves, outputs, loss = oracles.member_run(
                case, GroupSequence(case.layout, comm, engine=chosen)
            )
            loss.backward()
            found.append(
                (
                    {n: x.detach() for n, x in outputs.items()},
                    {n: x.grad for n, x in leaves.items()},
                )
            )
    return found


def run_single(rank: int, world: int) -> list:
    """Gather and reduce-scatter with the names of this torch, then with those of older ones."""
    found = []
    for absent in ((), ("all_gather_single", "reduce_scatter_single")):
        for name in absent:
            vars(dist).pop(name, None)  # an old torch has none
        gathered, reduced = torch.empty(3 * world), torch.empty(3)
        all_gather_single(gathered, torch.arange(3.0) + 10 * rank, dist.group.WORLD, False)
        summands = torch.arange(3.0 * world).sin() * (rank + 1)
        reduce_scatter_single(reduced, summands, dist.ReduceOp.SUM, dist.group.WORLD, False)
        found.append((gathered, reduced))
    return found


def run_two(rank: int) -> dict:
    return {
        "verbs": run_verbs(rank, [[0, 1]], [(1, 2), (2, 1)]),
        "streams": run_streams(rank, 2, [(1, 2), (2, 1)]),
        "fsdp": run_fsdp(rank, 2),
        "single": run_single(rank, 2),
    }


def run_four(rank: int) -> dict:
    together = run_verbs(rank, [[0, 1, 2, 3]], [(1, 4), (4, 1), (2, 2)])
    return {
        "verbs": together + run_verbs(rank, [[0, 2], [1, 3]], [(1, 2), (2, 1)]),
        "streams": run_streams(rank, 4, [(2, 2)]),
        "fsdp": run_fsdp(rank, 4),
    }


TASKS = {
    "two": run_two,
    "four": run_four,
    "deepspeed": lambda rank: run_engine("deepspeed", rank, 2),
}


def main(task: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    result = TASKS[task](rank)
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
