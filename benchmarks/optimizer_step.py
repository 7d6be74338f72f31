"""Compare a NorMuon step in which every process computes every matrix with one in which each matrix
has an owner.

    python benchmarks/optimizer_step.py

Waypoint's block matrices at a width of 256 (4 blocks), sharded by row over 2 and 4 gloo processes
on this machine. Both steps run in turn in the same processes; a time is the median over steps of
the slowest process, CPU seconds are the sum over processes. Where processes share cores, as here,
the ratio of times is that of the work. Updates must be equal to the bit, or the benchmark fails.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from wm_train.boxes import Box, local_box, local_tensor, row_shards, whole_tensor, within
from wm_train.optim.normuon import NorMuon, normalised, orthogonalise

WIDTH, BLOCKS, STEPS, WARM = 256, 4, 7, 2
BLOCK = (
    (WIDTH, WIDTH),
    (WIDTH // 2, WIDTH),
    (WIDTH // 2, WIDTH),
    (WIDTH, WIDTH),
    (4 * WIDTH, WIDTH),
    (WIDTH, 4 * WIDTH),
    (WIDTH, WIDTH),
)


class Gathered(NorMuon):
    """Gather every matrix to every process, which all compute the same update."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                slots = self.state[matrix]
                slots["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                nesterov = torch.lerp(matrix.grad, slots["momentum"], group["momentum"])
                squares = whole_tensor(slots["row_square"])
                update, squares = normalised(
                    orthogonalise(whole_tensor(nesterov)), squares, group["beta2"], group["scale"]
                )
                mine = within(local_box(matrix), Box((0, 0), tuple(matrix.shape)))
                local_tensor(slots["row_square"]).copy_(squares[mine[0]])
                local_tensor(matrix).sub_(update[mine], alpha=group["lr"])


def weights(mesh: object) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draws) for shape in BLOCK * BLOCKS]
    return [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in made]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    facts = {"lr": 1e-3, "momentum": 0.95, "beta2": 0.95, "weight_decay": 0.0}
    kinds = {
        name: (kind(own := weights(mesh), **facts), own)
        for name, kind in (("gathered", Gathered), ("owners", NorMuon))
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for step in range(WARM + STEPS):
        for name, (optimizer, own) in kinds.items():
            draws = torch.Generator().manual_seed(step + 1)
            for x in own:
                x.grad = distribute_tensor(torch.randn(x.shape, generator=draws), mesh, [Shard(0)])
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            optimizer.step()
            own_time = time.process_time() - cpu
            dist.barrier()
            if step >= WARM:
                found[name].append((time.perf_counter() - start, own_time))
    pairs = zip(kinds["gathered"][1], kinds["owners"][1], strict=True)
    assert all(torch.equal(local_tensor(a), local_tensor(b)) for a, b in pairs)
    assert row_shards(kinds["owners"][1][0]).rows == (WIDTH // world,) * world
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    print(f"{BLOCKS} blocks of width {WIDTH}, {len(BLOCK) * BLOCKS} matrices; median of {STEPS}\n")
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, (world, folder), world)
            ranks = [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(world)]
        times, cpus = {}, {}
        for name in ("gathered", "owners"):
            steps = list(zip(*(rank[name] for rank in ranks), strict=True))
            times[name] = statistics.median(max(t for t, _ in step) for step in steps)
            cpus[name] = statistics.median(sum(c for _, c in step) for step in steps)
            print(
                f"  P={world} {name:9} {times[name]:7.3f} s a step, {cpus[name]:7.3f} CPU seconds"
            )
        print(
            f"  P={world} owners: {times['gathered'] / times['owners']:.2f} times faster,"
            f" {cpus['gathered'] / cpus['owners']:.2f} times less work\n"
        )


if __name__ == "__main__":
    main()
