"""Two steps of an optimizer on sharded weights; rank 0 writes the weights and the state that
result."""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from wm_train.backends import get_backend
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
            "gate": (4, 20),
            "norm": (20,),
        }
        draws = torch.Generator().manual_seed(0)
        self.blocks = torch.nn.ParameterDict(
            {n: torch.nn.Parameter(torch.randn(s, generator=draws)) for n, s in shapes.items()}
        )

    def units(self) -> list[torch.nn.Module]:
        return [self.blocks]


def main(name: str, out: Path) -> None:
    world = join_world(get_backend("cpu"), 30.0)
    mesh = init_device_mesh("cpu", (world.size,))
    toy = Toy()
    for key, parameter in toy.blocks.items():
        toy.blocks[key] = torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
    config = config_class("optimizers", name)(lr=0.1)
    optimizer = builder(config)(toy, config)
    draws = torch.Generator().manual_seed(1)
    for _ in range(2):
        for parameter in toy.parameters():
            parameter.grad = distribute_tensor(
                torch.randn(parameter.shape, generator=draws), mesh, [Shard(0)]
            )
        optimizer.step()
    result = {n: p.detach() for n, p in toy.named_parameters()} | optimizer_tensors(toy, optimizer)
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in result.items()}
    if world.rank == 0:
        torch.save(whole, out)
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end_process(0)
