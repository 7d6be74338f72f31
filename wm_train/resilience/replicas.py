"""Detect silent data corruption by comparing tensors that must be equal on several processes.

With dp_replicate > 1 every shard of weights, moments and average is stored on several devices, and
the same arithmetic in the same order keeps them equal to the bit. A checksum of each, a few bytes,
is gathered; a flipped bit changes it. Where nothing is replicated (plain FSDP) there is nothing to
compare.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from wm_train.boxes import local_box, local_tensor
from wm_train.world import World


class CorruptionError(Exception):
    """Report that copies of one tensor differ between processes."""


def checksum(tensor: torch.Tensor) -> int:
    """Return a number that any one flipped bit changes: the sum of all words.

    It is computed on the tensor's device.
    """
    flat = tensor.detach().contiguous().reshape(tensor.numel()).view(torch.uint8)
    words = flat[: flat.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) + int(flat[words.numel() * 4 :].sum(dtype=torch.int64))


def check_replicas(step: int, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Compare the copies of the same boxes on different processes.

    Raises CorruptionError on all processes, with the rank that differs from a majority, or all that
    differ, and the tensors.
    """
    sums = {
        name: checksum(local)
        for name, tensor in tensors.items()
        if (local := local_tensor(tensor)).numel()
    }
    mine = []
    # whole tensors, then shards: processes with the same boxes are replicas
    for sharded in (False, True):
        names = [name for name in sums if isinstance(tensors[name], DTensor) == sharded]
        mine += [
            _crc([(name, local_box(tensors[name])) for name in names]),
            _crc([sums[name] for name in names]),
        ]
    groups: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for rank, found in enumerate(world.gather(mine)):
        for kind in (0, 1):
            groups[kind, found[2 * kind]][rank] = found[2 * kind + 1]
    if all(len(set(values.values())) == 1 for values in groups.values()):
        return
    everything = world.gather(sums)  # rare, so it may be long
    raise CorruptionError(
        "; ".join(
            text for values in groups.values() for text in _differences(step, values, everything)
        )
    )


def _crc(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def _differences(step: int, values: dict[int, int], everything: list[dict[str, int]]) -> list[str]:
    if len(set(values.values())) == 1:
        return []
    (common, count), *_ = Counter(values.values()).most_common(1)
    majority = count > len(values) / 2
    wrong = (
        [rank for rank, value in values.items() if value != common] if majority else list(values)
    )
    right = next(rank for rank, value in values.items() if value == common)
    names = sorted(
        n
        for n in everything[right]
        if any(everything[rank].get(n) != everything[right][n] for rank in values)
    )
    who = (
        f"rank {', '.join(map(str, wrong))} holds"
        if majority
        else f"ranks {', '.join(map(str, wrong))} hold"
    )
    return [
        f"step {step}: {who} other bits than its replicas in {len(names)} tensors"
        f" ({', '.join(names[:3])}), expected the same. No checkpoint was made of them. Fix: start"
        " again from the last checkpoint, without that device if it happens again"
    ]
