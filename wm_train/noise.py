"""Generate random numbers keyed by what they are for: a counter-based generator in tensor ops.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Every value
is a function of (seed, stage, purpose, draw, latent frame, element) and of nothing else, so a clip
gets the same noise on one device and on a hundred, after a resume and after a change of the mesh.
The integers are the same bits on every device; normals agree up to the device's log, sin and cos.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# all arithmetic is modulo 2**32, carried in int64 because integer tensors have no unsigned 32-bit
# multiply
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Keys of no stage: a stage's name has no slash (curriculum.NAME), so no stage draws their numbers.
PARAMETERS, VALIDATION, PARITY = "/parameters", "/validation", "/parity"
VALIDATION_AGAIN = "/validation/again"  # another noise for the same clips
KEYING = 2  # how noise and order are keyed, kept in checkpoints; 1 was by the stage's position


Word = TypeVar("Word", Tensor, int)


@dataclass(frozen=True)
class NoiseKey:
    """Identify the random numbers of one stage of one run."""

    seed: int
    stage: str  # its name, not its position: a recipe may grow around it. Or a reserved name above


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Compute ten rounds of Philox over broadcastable int64 tensors.

    counter: four tensors with values in [0, 2**32); key: two integers in [0, 2**32). Returns four
    int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    return philox_rounds(c0, c1, c2, c3, key)


def philox_rounds(c0: Word, c1: Word, c2: Word, c3: Word, key: tuple[int, int]) -> tuple[Word, ...]:
    """Compute ten rounds of Philox over int64 tensors of one shape, or over Python integers."""
    k0, k1 = key
    for _ in range(ROUNDS):
        # A tensor's product wraps at 64 bits; its 64 bit pattern is right, so both halves survive
        # the masks.
        low = c0 * MULTIPLIERS[0]
        high = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & WORD) ^ c1 ^ k0,
            high & WORD,
            ((low >> 32) & WORD) ^ c3 ^ k1,
            low & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def generator_key(key: NoiseKey, purpose: str) -> tuple[int, int]:
    """Return the two key words of one stream of numbers; each purpose is an independent stream."""
    digest = hashlib.blake2b(f"{key.seed}/{key.stage}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_words(
    key: NoiseKey, purpose: str, draws: Tensor, frames: range | tuple[int, int], count: int
) -> Tensor:
    """Return raw 32-bit words, [b, t, ceil(count / 4), 4] int64.

    There is one block of four words per (draw, frame, element // 4). draws: int64 [b], the position
    of each clip in the stage's global sample stream; frames: the latent frames to generate for.
    """
    start, stop = (frames.start, frames.stop) if isinstance(frames, range) else frames
    device = draws.device
    blocks = torch.arange((count + 3) // 4, device=device)[None, None, :]
    times = torch.arange(start, stop, device=device)[None, :, None]
    draws = draws.to(torch.int64)[:, None, None]
    words = philox4x32(
        (blocks, times, draws & WORD, (draws >> 32) & WORD), generator_key(key, purpose)
    )
    return torch.stack(words, dim=-1)


def unit_interval(words: Tensor) -> Tensor:
    """Convert 32-bit words to fp32 in the open interval (0, 1), exactly.

    It uses 23 bits and a half, so neither 0 nor 1 can occur.
    """
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal(
    key: NoiseKey,
    purpose: str,
    draws: Tensor,
    frames: range | tuple[int, int],
    shape: Sequence[int],
) -> Tensor:
    """Return standard normals, fp32 [b, t, *shape] on the device of `draws`.

    Box-Muller on the four words of a block. A slice of frames equals the slice of the whole, on
    every rank.
    """
    count = math.prod(shape)
    values = unit_interval(random_words(key, purpose, draws, frames, count))
    radius = torch.sqrt(-2.0 * torch.log(values[..., 0::2]))  # [b, t, blocks, 2]
    angle = (2.0 * math.pi) * values[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    b, t, blocks = pairs.shape[:3]
    return pairs.reshape(b, t, blocks * 4)[..., :count].reshape(b, t, *shape)


def uniform(key: NoiseKey, purpose: str, draws: Tensor) -> Tensor:
    """Return one uniform number in (0, 1) per clip, fp32 [b]."""
    return unit_interval(random_words(key, purpose, draws, (0, 1), 1)[:, 0, 0, 0])


def host_uniform(key: NoiseKey, purpose: str, draw: int) -> float:
    """Return `uniform` of one draw, to the bit, computed from Python integers alone.

    For numbers by which the host decides what runs: nothing is read back from a device, and a step
    on fake tensors takes the same decisions as a real one.
    """
    counter = (0, 0, draw & WORD, (draw >> 32) & WORD)
    word = philox_rounds(*counter, generator_key(key, purpose))[0]
    return ((word >> 9) + 0.5) * 2.0**-23
