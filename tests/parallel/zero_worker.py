"""One process of a ZeRO-3 run: python zero_worker.py <folder> <offload> <sub-group size>. Rank 0
writes result.pt."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from parallel.zero import Zero3, building, zero_config

STEPS, CLIP = 3, 0.1


def make_model() -> nn.Module:
    """Two matrices and a norm in stretches above a megabyte on each of two processes, none of them
    a multiple of anything."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(725, 727, bias=False), nn.Linear(727, 731, bias=False), nn.LayerNorm(524_399)
    )


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    """Without the norm in the second step: its gradient is zero then, not that of the first."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, y = torch.randn(4, 725, generator=generator), torch.randn(524_399, generator=generator)
    loss = model[1](model[0](x)).square().mean()
    return loss if step == 1 else loss + model[2](y).square().mean()


def make_optimizer(parameters: list[nn.Parameter], matrix) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if matrix(p) is kind], "weight_decay": 0.1 * kind}
        for kind in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def damaged_and_checked(zero: Zero3, folder: Path) -> str:
    """Return the error for one flipped bit of a file; flip it back."""
    file = next(
        path
        for path in sorted(folder.rglob(f"rank{dist.get_rank()}/*.swp"))
        if "exp_avg" not in path.name
    )
    for _ in range(2):
        with file.open("r+b") as stream:
            first = stream.read(1)
            stream.seek(0)
            stream.write(bytes([first[0] ^ 1]))
        try:
            zero.check_disk()
        except ValueError as error:
            said = str(error)
    return said


def main(folder: Path, offload: str, sub_group_size: int) -> None:
    dist.init_process_group("gloo")
    settings = zero_config("fp32", offload, str(folder))
    settings["zero_optimization"] |= {"sub_group_size": sub_group_size}
    with building(settings):
        model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    zero = Zero3(
        model,
        make_optimizer(list(model.parameters()), lambda p: len(p.ds_shape) > 1),
        mesh,
        settings,
    )
    found = damaged_and_checked(zero, folder) if offload == "nvme" else ""
    norms = []
    for step in range(STEPS):
        for buffer in (
            zero.inner.optimizer_swapper.swap_buffer_manager.all_buffers
            if offload == "nvme"
            else ()
        ):
            buffer.fill_(torch.nan)  # something that was read before
        loss = loss_of(zero.engine.module, dist.get_rank(), step)
        zero.backward(loss, last=True)
        square = sum(g.double().square().sum() for g in zero.gradients())
        dist.all_reduce(square)
        norms.append(float(square.sqrt()))
        zero.scale_gradients(min(1.0, CLIP / norms[-1]))
        zero.step()
        zero.zero_grad()
    weights = {
        name: zero.rows(stretch, zero.shape(name)).full_tensor()
        for name, stretch in zero.weights().items()
    }
    if dist.get_rank() == 0:
        torch.save({"found": found, "norms": norms, "weights": weights}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # see wm_train.worker.end_process
