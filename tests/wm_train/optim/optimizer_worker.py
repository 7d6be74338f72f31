"""Steps of an optimizer on sharded weights; rank 0 writes the weights and the state that result.

optimizer_worker.py <optimizer> <file> <checkpoints> <first step> <one past the last> <replicas>:
from a first step above 0 it goes on from the newest checkpoint; it ends with one.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from wm_train.backends import get_backend
from wm_train.checkpoint import store, writer
from wm_train.config.registry import builder, config_class
from wm_train.models.spec import WorldModel
from wm_train.optim.adamw import optimizer_tensors
from wm_train.worker import end_process
from wm_train.world import join_world, leave_world


class Toy(WorldModel):
    """Names and shapes as in a backbone: a wide, a tall and a 1 x 1 convolution matrix, a gate
    table and a norm."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "wide": (17, 40),
            "tall": (50, 18),
            "conv": (20, 24, 1, 1),
            "square": (16, 16),
            "gate": (4, 20),
            "norm": (20,),
        }
        draws = torch.Generator().manual_seed(0)
        self.blocks = torch.nn.ParameterDict(
            {n: torch.nn.Parameter(torch.randn(s, generator=draws)) for n, s in shapes.items()}
        )

    def units(self) -> list[torch.nn.Module]:
        return [self.blocks]


def main(name: str, out: Path, checkpoints: Path, first: int, stop: int, replicas: int) -> None:
    world = join_world(get_backend("cpu"), 30.0)
    mesh = init_device_mesh("cpu", (replicas, world.size // replicas))

    def sharded(whole: torch.Tensor) -> DTensor:
        return distribute_tensor(whole, mesh, [Replicate(), Shard(0)])

    toy = Toy()
    for key, parameter in toy.blocks.items():
        toy.blocks[key] = torch.nn.Parameter(sharded(parameter.data))
    config = config_class("optimizers", name)(lr=0.1)
    optimizer = builder(config)(toy, config)
    result = {n: p.detach() for n, p in toy.named_parameters()} | optimizer_tensors(toy, optimizer)
    if first:
        found = store.find_newest(checkpoints, world, print)
        assert found is not None
        store.load(*found, result)
    for step in range(first, stop):
        draws = torch.Generator().manual_seed(1 + step)
        for parameter in toy.parameters():
            parameter.grad = sharded(torch.randn(parameter.shape, generator=draws))
        optimizer.step()
    writer.save(checkpoints, stop, "stage", result, {}, world)
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in result.items()}
    if world.rank == 0:
        torch.save(whole, out)
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
    end_process(0)
