"""One process of the resharding test: `save` writes sharded tensors, `load` reads them back on any
number of processes."""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from wm_train.backends import get_backend
from wm_train.checkpoint import store, writer
from wm_train.worker import end_process
from wm_train.world import join_world, leave_world

SHAPES = {"model/matrix": (7, 6), "model/row": (3,), "model/one": (1, 4), "optimizer/step": ()}


def whole(name: str) -> torch.Tensor:
    count = torch.Size(SHAPES[name]).numel()
    return torch.arange(count, dtype=torch.float32).reshape(SHAPES[name]) + len(name)


def main(action: str, root: Path, replicas: int) -> None:
    world = join_world(get_backend("cpu"), 30.0)
    mesh = init_device_mesh(
        "cpu", (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard")
    )
    placements = [Replicate(), Shard(0)]
    full = {name: whole(name) for name in SHAPES}
    start = (
        full
        if action == "save"
        else {name: torch.full_like(tensor, -1) for name, tensor in full.items()}
    )
    tensors = {
        n: distribute_tensor(t.clone(), mesh, placements) if t.dim() else t.clone()
        for n, t in start.items()
    }
    if action == "save":
        writer.save(root, 1, "short", tensors, {}, world)
    else:
        found = store.find_newest(root, world, print)
        assert found is not None
        store.load(*found, tensors)
        for name, tensor in tensors.items():
            got = tensor.full_tensor() if tensor.dim() else tensor
            assert torch.equal(got, full[name]), (name, got)
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    end_process(0)
