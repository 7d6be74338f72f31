"""Measure the error that rounded tensor-core operands leave in a GDN state over T=251 frames, on
the CPU.

    python benchmarks/state_precision.py

S_t = γ (S − S·A) + U with S kept in fp32; only the operands of S·A are rounded: to nearest TF32, or
truncated to it, which is what the hardware does with an fp32 operand by itself. RMS ratio of the
whole state history to fp64. D=112, 220 tokens per frame, keys of ReLU'd normals, independent or
with a direction in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FRAMES, DIM, TOKENS = 251, 112, 220


def nearest(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def make_frames(common: float) -> tuple[Tensor, Tensor]:
    """A and U of every frame, fp32."""
    key = torch.relu(torch.randn(FRAMES, TOKENS, DIM) + common * torch.randn(1, 1, DIM))
    key = key / key.square().mean(-1, keepdim=True).sqrt() * (DIM * TOKENS) ** -0.5
    weighted = key * (0.3 + 0.7 * torch.rand(FRAMES, TOKENS, 1))
    return weighted.transpose(1, 2) @ key, torch.randn(FRAMES, TOKENS, DIM).transpose(
        1, 2
    ) @ weighted


def states(
    gram: Tensor, update: Tensor, decay: float, round_state: Callable, round_gram: Callable
) -> Tensor:
    """S after every frame."""
    state, history = torch.zeros_like(update[0]), []
    for a, u in zip(gram, update):
        state = decay * (state - round_state(state) @ round_gram(a)) + u
        history.append(state)
    return torch.stack(history)


def exactly(x: Tensor) -> Tensor:
    return x


def main() -> None:
    torch.manual_seed(0)
    ways = {
        "both to nearest": (nearest, nearest),
        "state to nearest, A truncated": (nearest, truncated),
        "both truncated": (truncated, truncated),
    }
    print("| keys | γ | " + " | ".join(ways) + " |\n|---|---|" + "---|" * len(ways))
    for common in (0.0, 1.0):
        gram, update = make_frames(common)
        for decay in (1.0, 0.99):
            exact = states(gram.double(), update.double(), decay, exactly, exactly)
            errors = [
                (states(gram, update, decay, *way) - exact).norm() / exact.norm()
                for way in ways.values()
            ]
            print(
                f"| {'correlated' if common else 'independent'} | {decay} | "
                + " | ".join(f"{e:.1e}" for e in errors)
                + " |"
            )


if __name__ == "__main__":
    main()
