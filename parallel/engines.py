"""Offer attention engines of other libraries: `parallel.attention=native|deepspeed|xfuser`.

native is our own (`attend.py`). The others compute plain bidirectional attention over evenly split
clips; `check_engine` refuses everything else (packed documents, padding, chunk masks, uneven
shards). They are for comparison, and for installations that already trust one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.comm import Member
from parallel.layout import ClipLayout
from parallel.masks import FULL, AttentionMask

# q, k, v [B, T/P·S, H, D] -> [B, T/P·S, H, D]
AttentionEngine = Callable[[Tensor, Tensor, Tensor], Tensor]


class EngineComm(Protocol):
    """Describe the part of a `ProcessGroupComm` that an engine uses."""

    members: tuple[Member, ...]

    def group(self, axis: str) -> ProcessGroup: ...


def check_engine(
    name: str,
    layout: ClipLayout,
    mask: AttentionMask,
    member: Member,
    heads: int,
    key_heads: int,
    cache: object,
) -> None:
    """Raise ValueError unless another library's engine computes this case correctly.

    Without the check it would return wrong values, or hang.
    """
    rules = [
        (cache is None, "a cache of earlier frames", "none"),
        (mask == FULL, f"mask {mask}", "the full mask"),
        (
            len(layout.document_starts) == 1,
            f"documents at {layout.document_starts}",
            "one document",
        ),
        (layout.copies == 1, f"{layout.copies} copies of each frame", "single frames"),
        (not layout.ragged, f"valid_frames {layout.valid_frames}", "no padding"),
        (
            layout.frames % member.size == 0,
            f"{layout.frames} latent frames",
            f"a multiple of the {member.size} ranks",
        ),
        (heads % member.ulysses == 0, f"{heads} heads", f"a multiple of ulysses {member.ulysses}"),
        (
            key_heads % member.ulysses == 0,
            f"{key_heads} key heads",
            f"a multiple of ulysses {member.ulysses}",
        ),
    ]
    for holds, got, expected in rules:
        if not holds:
            raise ValueError(
                f"attention engine {name} does not compute this: got {got}, expected {expected}"
                " (key parallel.attention). Fix: parallel.attention=native"
            )


def deepspeed(comm: EngineComm) -> AttentionEngine:
    """Return DeepSpeed-Ulysses' `DistributedAttention` around PyTorch's attention.

    Ulysses only. It runs on CPUs too, where it is an exact oracle for tests.
    """
    from deepspeed import comm as deepspeed_comm
    from deepspeed.sequence.layer import DistributedAttention

    member = comm.members[0]
    if member.ring > 1:
        raise ValueError(
            f"attention engine deepspeed has no ring: got ring {member.ring}, expected 1. Fix:"
            " parallel.ring=1"
        )
    if not deepspeed_comm.is_initialized():
        deepspeed_comm.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
        )

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention over this rank's heads: q, k, v [B, T·S, H/P, D] -> [B, T·S, H/P, D]."""
        repeat = q.shape[2] // k.shape[2]
        q, k, v = (
            x.transpose(1, 2)
            for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2))
        )
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
        )

    module: Any = DistributedAttention(local, comm.group("ulysses"), scatter_idx=2, gather_idx=1)
    return lambda q, k, v: module(q, k, v, 0)


def xfuser(comm: EngineComm) -> AttentionEngine:
    """Return xDiT's long-context attention (Ulysses × ring), for accelerators.

    Its import fails on CPUs. Source: xfuser 0.7, yunchang 0.6.
    """
    from xfuser.core.long_ctx_attention import xFuserLongContextAttention
    from yunchang import set_seq_parallel_pg

    member = comm.members[0]
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    set_seq_parallel_pg(member.ulysses, member.ring, rank, world, use_ulysses_low=True)
    module: Any = xFuserLongContextAttention()
    return lambda q, k, v: module(None, q, k, v)


ENGINES: dict[str, Callable[[Any], AttentionEngine]] = {"deepspeed": deepspeed, "xfuser": xfuser}


def make_engine(name: str, comm: EngineComm | None) -> tuple[str, AttentionEngine] | None:
    """Return (name, engine) for a sequence group, made once per run.

    Returns None for our own attention, or when clips are not split.
    """
    if name != "native" and name not in ENGINES:
        raise ValueError(
            f"attention engine is unknown: got {name!r}, expected native, {', '.join(ENGINES)} (key"
            " parallel.attention)"
        )
    return None if name == "native" or comm is None else (name, ENGINES[name](comm))
