"""Make the cases of the verbs' tests: layouts and inputs. Tests import them from `oracles`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.masks import FULL, AttentionMask

SINK = AttentionMask("chunk", window=2, sink=1)
LEAVES = {
    "scan": tuple(
        f"{stream}.{part}"
        for stream in ("numerator", "normaliser")
        for part in ("decay", "gram", "update")
    ),
    "halo": ("x", "y"),
    "attend": ("q", "k", "v"),
    "mean": ("value", "weight"),
}


@dataclass(frozen=True)
class Case:
    """One layout and the verbs to run on it."""

    layout: ClipLayout
    verbs: tuple[str, ...] = ("scan", "halo", "attend", "mean")
    reverse: str | None = "exclusive"
    initial: bool = False
    before: int = 2
    after: int = 1
    halo_edges: str = "clip"
    mask: AttentionMask = field(default=FULL)
    batch: int = 2
    tokens: int = 2
    heads: int = 4
    key_heads: int = 4
    dim: int = 4
    dtype: torch.dtype = torch.float64
    seed: int = 0
    exchange: str = "usp"
    perturbed: tuple[int, int] | None = None  # row and frame whose inputs all change


def inputs(case: Case) -> dict[str, Tensor]:
    """Full-clip inputs and upstream gradients, a function of the case alone."""
    g = torch.Generator().manual_seed(case.seed)
    t, b, s, h, d = case.layout.frames, case.batch, case.tokens, case.heads, case.dim

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    found = {}
    for name, e in (("numerator", d), ("normaliser", 1)):
        keys = normal(b, t, h, d, 2 * d) * (0.6 / (2 * d) ** 0.5)
        found[f"{name}.decay"] = 0.7 + 0.3 * torch.rand(
            b, t, h, generator=g, dtype=torch.float64
        ).to(case.dtype)
        found[f"{name}.gram"] = keys @ keys.mT
        found[f"{name}.update"] = normal(b, t, h, e, d)
        found[f"{name}.initial"] = normal(b, h, e, d)
        found[f"{name}.upstream"] = normal(b, t, h, e, d)
        found[f"{name}.upstream_final"] = normal(b, h, e, d)
    found["x"], found["y"] = normal(b, t, s, 3), normal(b, t, 5)
    found["x.upstream"] = normal(case.before + case.after + 1, b, t, s, 3)
    found["y.upstream"] = normal(case.before + case.after + 1, b, t, 5)
    found["q"], found["k"], found["v"] = (
        normal(b, t, s, h, d),
        normal(b, t, s, case.key_heads, d),
        normal(b, t, s, case.key_heads, d),
    )
    found["out.upstream"] = normal(b, t, s, h, d)
    found["value"], found["weight"] = (
        normal(b, t, s),
        torch.rand(b, t, generator=g, dtype=torch.float64).to(case.dtype),
    )
    found["mean.upstream"] = normal(b)
    if case.perturbed is not None:
        for name in (n for names in LEAVES.values() for n in names):
            found[name][case.perturbed] *= 1.25
            if not name.endswith(("decay", "gram")):
                found[name][case.perturbed] += 0.5
    return found


def process_cases() -> list[Case]:
    """List the cases for gloo and for virtual ranks: every verb; cut, ragged and too short clips;
    GQA; three dtypes."""
    packed = ClipLayout(11, document_starts=(0, 7), chunk_starts=(0, 3, 6, 9), valid_frames=(11, 9))
    return [
        Case(ClipLayout(11)),
        Case(
            packed,
            reverse="inclusive",
            initial=True,
            before=3,
            after=3,
            halo_edges="chunk",
            mask=SINK,
            key_heads=2,
        ),
        Case(ClipLayout(3), heads=5, key_heads=5, initial=True),
        Case(
            ClipLayout(7),
            reverse=None,
            halo_edges="document",
            mask=AttentionMask("frame", 2, 1, 2),
            dtype=torch.float32,
            key_heads=1,
        ),
        Case(ClipLayout(5), verbs=("halo", "attend", "mean"), dtype=torch.bfloat16),
        *(
            Case(packed, ("attend",), mask=mask, key_heads=2, exchange="need")
            for mask in (SINK, AttentionMask("frame", 3), AttentionMask("frame", 1, 0, 2, 6))
        ),
    ]


def engine_cases() -> list[Case]:
    """List the cases that other engines can compute: full masks, even shares, batch above one,
    grouped key heads."""
    return [
        Case(ClipLayout(6), ("attend",)),
        Case(ClipLayout(4), ("attend",), batch=3, heads=8, key_heads=4, tokens=3),
    ]


def starts(frames: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Starts of chunks of the given sizes, the last size repeating."""
    found, cursor = [], 0
    while cursor < frames:
        found.append(cursor)
        cursor += sizes[min(len(found), len(sizes)) - 1]
    return tuple(found)


def layouts(frames: int) -> dict[str, ClipLayout]:
    """The kinds of clip that every verb must handle, batch 2."""
    documents = tuple(n for n in (0, frames // 3, frames - 2) if 0 <= n < frames)
    documents = tuple(sorted(set(documents)))
    given = tuple(n for n in (0, 1, 2, 6, 13, 40, 77) if n < frames)
    return {
        "plain": ClipLayout(frames),
        "chunks 4,3,3": ClipLayout(frames, chunk_starts=starts(frames, (4, 3))),
        "chunks given": ClipLayout(frames, chunk_starts=given),
        "documents": ClipLayout(frames, document_starts=documents),
        "ragged": ClipLayout(frames, valid_frames=(max(frames - 3, 0), (frames + 1) // 2)),
        "all": ClipLayout(frames, documents, starts(frames, (5,)), (frames, max(frames - 1, 0))),
    }
