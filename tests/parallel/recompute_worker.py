"""One process of test_recompute.py: python recompute_worker.py <rank> <ring> <ulysses> <folder>."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.checkpointing import checkpoint
from parallel.comm import Member
from parallel.layout import ClipLayout
from parallel.mesh import sequence_comm
from parallel.sequence import GroupSequence

B, S, H, D, BLOCKS = 2, 3, 4, 8, 2


class Block(nn.Module):
    """Attention under a linear layer before and after it, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor, sequence: GroupSequence) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).unbind(3)
        return x + self.out(sequence.attend(q, k, v).flatten(-2)).sin()


def live_bytes() -> int:
    """Bytes of the distinct storages of the tensors that Python holds; autograd's own it does not
    see."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def one(kind: str, comm, frames: int, rank: int) -> dict:
    """kind: a mode, with `+host` under hooks that move saved tensors away from torch."""
    mode, _, host = kind.partition("+")
    hooks = saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy)
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).double()
    whole = torch.randn(B, frames, S, H * D, dtype=torch.float64)
    recompute = "answers" if mode == "none" else mode
    sequence = GroupSequence(ClipLayout(frames), comm, exchange="usp", recompute=recompute)
    local = slice(sequence.frames.start, sequence.frames.stop)
    x = leaf = whole[:, local].clone().requires_grad_()
    sent = sum(comm.traffic.sent.values())
    before = live_bytes()
    with hooks if host else nullcontext():
        for block in blocks:
            x = (
                block(x, sequence)
                if mode == "none"
                else checkpoint(block, x, sequence, sequence=sequence)
            )
    held = live_bytes() - before - x.untyped_storage().nbytes()
    x.square().sum().backward()
    results = {name: p.grad for name, p in blocks.named_parameters()} | {"x": leaf.grad}
    heads = H // comm.members[0].ulysses
    rows = B * len(sequence.frames) * comm.members[0].ulysses * S * heads
    kept = 8 * rows * BLOCKS if kind == "keep_attention" else 0
    sent = sum(comm.traffic.sent.values()) - sent
    return {"results": results, "held": held, "log_sum_exp": kept, "sent": sent}


def main(rank: int, ring: int, ulysses: int, folder: Path) -> None:
    world, frames = ring * ulysses, 2 * ring * ulysses
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    line = list(range(world))
    groups = {
        "sequence": [line],
        "ulysses": [line[r * ulysses : (r + 1) * ulysses] for r in range(ring)],
        "ring": [line[u::ulysses] for u in range(ulysses)],
    }
    comm = sequence_comm(Member(*divmod(rank, ulysses), ring, ulysses), groups)
    modes = ("answers", "keep_attention", "collectives")
    kinds = ("none", *modes, *(f"{mode}+host" for mode in modes))
    found = {kind: one(kind, comm, frames, rank) for kind in kinds}
    unit = B * (frames // world) * S * H * D * 8 * BLOCKS
    torch.save({**found, "unit": unit}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
