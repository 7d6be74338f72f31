"""Compare the bytes that one layer sends: prefix-composed GDN states, all-gathered keys and values,
Ulysses, ring, needed frames.

    python benchmarks/parallel_traffic.py

SANA-WM at 60 s 720p (T=121, S=880, H=20, D=112, bfloat16 activations, float32 states), and
Waypoint-1.5 at 12.8 s 720p (T=192, S=512, 32 query and 16 key heads of 64). The real verbs run over
P virtual ranks on meta tensors, so every number is counted, none is a formula. Bytes are those that
the busiest member sends for one layer and one clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from parallel.comm import AllGather, Traffic, pack
from parallel.layout import ClipLayout
from parallel.masks import FULL, AttentionMask
from parallel.reference import Kernels, Stream
from parallel.sequence import GroupSequence, SequenceShard
from parallel.streaming import chunk_starts
from parallel.virtual import VirtualGroup, run_virtual

T, S, H, D = 121, 880, 20, 112
MEMBERS = (2, 4, 8)
SANA = ClipLayout(T)
SANA_CHUNKS = ClipLayout(T, chunk_starts=chunk_starts(T, 3))
STUDENT = AttentionMask("chunk", window=2, sink=1)  # of SANA-WM's distilled student (§5.4)
WAYPOINT_T, WAYPOINT_S, HEADS, KEY_HEADS, HEAD = 192, 512, 32, 16, 64
# mask -> number of blocks that have it
WAYPOINT = {
    "local": (AttentionMask("frame", window=16), 18),
    "global": (AttentionMask("frame", window=1, dilation=8, reach=128), 6),
}


def no_attention(q: Tensor, k: Tensor, v: Tensor, tiles: object) -> tuple[Tensor, Tensor]:
    """Right shapes, no work: only the traffic counts here."""
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def no_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))


KERNELS = Kernels(block_attention=no_attention, block_attention_backward=no_attention_backward)


def count(
    call: Callable[[SequenceShard], Tensor],
    ring: int = 1,
    ulysses: int = 1,
    layout: ClipLayout = SANA,
    exchange: str = "usp",
) -> list[Traffic]:
    """Traffic of one call, forward and backward."""
    results, traffic = run_virtual(
        lambda comm: call(GroupSequence(layout, comm, KERNELS, exchange=exchange)), ring, ulysses
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


def attend(heads: int, mask: AttentionMask = FULL) -> Callable[[SequenceShard], Tensor]:
    return lambda sequence: sequence.attend(
        *(tokens(sequence, heads) for _ in range(3)), mask
    ).sum()


def waypoint_attend(mask: AttentionMask) -> Callable[[SequenceShard], Tensor]:
    """Attention of one of Waypoint's blocks: grouped heads, one of its masks."""

    def call(sequence: SequenceShard) -> Tensor:
        def empty(heads: int) -> Tensor:
            shape = (1, len(sequence.frames), WAYPOINT_S, heads, HEAD)
            return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

        return sequence.attend(empty(HEADS), empty(KEY_HEADS), empty(KEY_HEADS), mask).sum()

    return call


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
        sent = busiest(traffic, way)
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
        row(
            "needed frames, both branches, chunk window of the student",
            count(attend(2 * H, STUDENT), 1, members, SANA_CHUNKS, "need"),
            layer,
        )
        print(
            f"  states alone: Ulysses over both branches sends {both(members) / states:.0f} times"
            " as much\n"
        )
    waypoint()


def waypoint() -> None:
    """Print Waypoint's rows: MiB of a layer, then GiB of all 24 and their ratio."""
    print(
        f"Waypoint-1.5, T={WAYPOINT_T} S={WAYPOINT_S} H={HEADS}/{KEY_HEADS} D={HEAD}: MiB that the"
        " busiest member sends, forward / backward of one layer\n"
    )
    layout = ClipLayout(WAYPOINT_T)
    for members in MEMBERS:
        whole: dict[str, int] = {}
        for name, mesh, exchange in (
            ("Ulysses", (1, members), "usp"),
            ("ring", (members, 1), "usp"),
            ("needed frames", (1, members), "need"),
        ):
            row = [f"  P={members} {name:14}"]
            for kind, (mask, blocks) in WAYPOINT.items():
                traffic = count(waypoint_attend(mask), *mesh, layout, exchange)
                ways = [busiest(traffic, way) for way in ("forward", "backward")]
                whole[name] = whole.get(name, 0) + blocks * ways[0]
                row.append(f"{kind} {ways[0] / 2**20:5.0f} / {ways[1] / 2**20:5.0f}")
            row.append(f"model forward {whole[name] / 2**30:5.2f} GiB")
            row.append(f"{whole[name] / whole['Ulysses']:5.2f} x Ulysses")
            print("   ".join(row))
        need = whole["needed frames"]
        print(
            f"  P={members} needed frames send {whole['Ulysses'] / need:.1f} times less than"
            f" Ulysses, {whole['ring'] / need:.1f} times less than the ring\n"
        )


def busiest(traffic: list[Traffic], way: str) -> int:
    return max(sum(n for label, n in t.sent.items() if label.endswith(way)) for t in traffic)


def both(members: int) -> int:
    return max(sum(t.sent.values()) for t in count(attend(2 * H), ulysses=members))


if __name__ == "__main__":
    main()
