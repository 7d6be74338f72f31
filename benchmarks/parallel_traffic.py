"""Compare the bytes that one layer sends: prefix-composed GDN states, all-gathered keys and values,
Ulysses.

    python benchmarks/parallel_traffic.py

SANA-WM at 60 s 720p (T=121, S=880, H=20, D=112, bfloat16 activations, float32 states). The real
verbs run over P virtual ranks on meta tensors, so every number is counted, none is a formula. Bytes
are those that the busiest member sends for one layer and one clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from parallel.comm import AllGather, Traffic, pack
from parallel.layout import ClipLayout
from parallel.reference import Kernels, Stream
from parallel.sequence import GroupSequence, SequenceShard
from parallel.virtual import VirtualGroup, run_virtual

T, S, H, D = 121, 880, 20, 112
MEMBERS = (2, 4, 8)


def no_attention(q: Tensor, k: Tensor, v: Tensor, tiles: object) -> tuple[Tensor, Tensor]:
    """Right shapes, no work: only the traffic counts here."""
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def no_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))


KERNELS = Kernels(block_attention=no_attention, block_attention_backward=no_attention_backward)


def count(
    call: Callable[[SequenceShard], Tensor], ring: int = 1, ulysses: int = 1
) -> list[Traffic]:
    """Traffic of one call, forward and backward."""
    results, traffic = run_virtual(
        lambda comm: call(GroupSequence(ClipLayout(T), comm, KERNELS)), ring, ulysses
    )
    sum(result.float().sum() for result in results).backward()
    return traffic


def tokens(sequence: SequenceShard, heads: int) -> Tensor:
    return torch.empty(
        1,
        len(sequence.frames),
        S,
        heads,
        D,
        dtype=torch.bfloat16,
        device="meta",
        requires_grad=True,
    )


def scan(sequence: SequenceShard) -> Tensor:
    """Numerator, normaliser and camera."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(1, len(sequence.frames), H, *shape, device="meta", requires_grad=True)

    streams = [Stream(empty(), empty(D, D), empty(e, D)) for e in (D, 1, D)]
    states = sequence.scan(streams).states
    return torch.stack([one.sum() for one in states]).sum()


def key_halo(sequence: SequenceShard) -> Tensor:
    """Width-4 convolution both ways on the keys of both branches."""
    taps = sequence.halo([tokens(sequence, H), tokens(sequence, H)], 3, 3)
    return sum(tap.sum() for group in taps for tap in group)  # type: ignore[return-value]


def ffn_halo(sequence: SequenceShard) -> Tensor:
    (taps,) = sequence.halo([tokens(sequence, H)], 1, 1)
    return sum(tap.sum() for tap in taps)  # type: ignore[return-value]


def attend(heads: int) -> Callable[[SequenceShard], Tensor]:
    return lambda sequence: sequence.attend(*(tokens(sequence, heads) for _ in range(3))).sum()


def gathered_keys_and_values(members: int) -> Traffic:
    """One branch, forward only: what public code sends per softmax layer (its backward
    reduce-scatters as much again)."""
    group = VirtualGroup(1, members)

    def program(frames: int):
        block = torch.empty(1, frames, S, H, D, dtype=torch.bfloat16, device="meta")
        yield AllGather(pack([block, block]))

    group.run("gather forward", [program(len(r)) for r in ClipLayout(T).split(members)])
    return group.traffic[0]


def row(name: str, traffic: list[Traffic], baseline: float | None = None) -> int:
    parts, total = [], 0
    for way in ("forward", "backward"):
        calls = max(
            sum(n for label, n in t.collectives.items() if label.endswith(way)) for t in traffic
        )
        sent = max(sum(n for label, n in t.sent.items() if label.endswith(way)) for t in traffic)
        total += sent
        parts.append(f"{calls:2d} x {sent / 1e6:8.1f} MB")
    ratio = "" if baseline is None else f"  {total / baseline:6.1f} x the GDN layer"
    print(f"  {name:52} {parts[0]:>18} {parts[1]:>18}{ratio}")
    return total


def main() -> None:
    print(
        f"T={T} S={S} H={H} D={D}; collectives x bytes sent by the busiest member, per layer and"
        " clip\n"
    )
    for members in MEMBERS:
        print(f"P={members:<52} {'forward':>18} {'backward':>18}")
        states = row("GDN states (3 streams, both directions)", count(scan, ulysses=members))
        halos = row("GDN halos: K of both branches", count(key_halo, ulysses=members))
        halos += row("GDN halos: FFN", count(ffn_halo, ulysses=members))
        layer = states + halos
        row(
            "all-gather of K and V, one branch (forward only)",
            [gathered_keys_and_values(members)],
            layer,
        )
        nearest = max(n for n in range(1, members + 1) if H % n == 0)
        row(
            f"Ulysses {nearest} (largest degree for {H} heads), one branch",
            count(attend(H), ulysses=nearest),
            layer,
        )
        usp = math.gcd(H, members)
        if usp != members:
            row(
                f"USP: ulysses {usp} x ring {members // usp}, one branch",
                count(attend(H), members // usp, usp),
                layer,
            )
        row(
            f"Ulysses {math.gcd(2 * H, members)}, both branches stacked to {2 * H} heads",
            count(attend(2 * H), ulysses=members),
            layer,
        )
        print(
            f"  states alone: Ulysses over both branches sends {both(members) / states:.0f} times"
            " as much\n"
        )


def both(members: int) -> int:
    return max(sum(t.sent.values()) for t in count(attend(2 * H), ulysses=members))


if __name__ == "__main__":
    main()
