"""A small hybrid model with everything that couples frames: K convolution, three GDN streams,
softmax attention, temporal FFN convolution.

Not a test module: `conftest.py` hands it to the tests as the fixture `hybrid`, and `gloo_worker.py`
imports it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout
from parallel.masks import CHUNK_CAUSAL
from parallel.reference import Stream

HEADS, WIDTH, TOKENS = 4, 16, 3


class TemporalConvolution(nn.Module):
    def __init__(self, before: int, after: int, edges: str) -> None:
        super().__init__()
        self.before, self.after, self.edges = before, after, edges
        self.weight = nn.Parameter(torch.empty(before + 1 + after, WIDTH))

    def forward(self, tensors, sequence):
        taps = sequence.halo(tensors, self.before, self.after, self.edges)
        return [sum(w * tap for w, tap in zip(self.weight, group)) for group in taps]


def by_head(x):
    return x.unflatten(-1, (HEADS, WIDTH // HEADS))


class GdnBlock(nn.Module):
    """1 scan and 2 halos."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.camera, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.gates = nn.Linear(WIDTH, 2 * HEADS)
        self.short = TemporalConvolution(3, 3, "chunk")
        self.ffn, self.temporal = nn.Linear(WIDTH, WIDTH), TemporalConvolution(1, 1, "document")

    def forward(self, x, sequence):
        q, k, v = self.qkv(x).chunk(3, -1)
        k, c = self.short([k, self.camera(x)], sequence)
        q, k, v, c = (by_head(y) for y in (q, k, v, c))
        scale = (TOKENS * WIDTH / HEADS) ** -0.5
        k, c = F.normalize(k.relu() + 0.1, dim=-1) * scale, F.normalize(c, dim=-1) * scale
        decay, beta = self.gates(x.mean(2)).sigmoid().unflatten(-1, (2, HEADS)).unbind(2)

        def stream(keys, values):
            weighted = keys * beta[:, :, None, :, None]
            gram = torch.einsum("btshd,btshe->bthde", weighted, keys)
            return Stream(
                0.5 + decay / 2, gram, torch.einsum("btshd,btshe->bthde", values, weighted)
            )

        ones = torch.ones_like(v[..., :1])
        numerator, normaliser, camera = sequence.scan(
            [stream(k, v), stream(k.abs(), ones), stream(c, v)]
        ).states
        read = torch.einsum("bthed,btshd->btshe", numerator + camera, q)
        read = read / (torch.einsum("bthed,btshd->btshe", normaliser, q.abs()) + 1)
        x = x + self.out(read.flatten(-2))
        return x + self.temporal([F.silu(self.ffn(x))], sequence)[0]


class SoftmaxBlock(nn.Module):
    """1 attend, both branches stacked on heads, and 1 halo."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.camera, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.ffn, self.temporal = nn.Linear(WIDTH, WIDTH), TemporalConvolution(1, 1, "document")

    def forward(self, x, sequence):
        q, k, v = (
            torch.cat([by_head(a), by_head(b)], 3)
            for a, b in zip(self.qkv(x).chunk(3, -1), self.camera(x).chunk(3, -1))
        )
        x = x + self.out(sequence.attend(q, k, v, CHUNK_CAUSAL).flatten(-2))
        return x + self.temporal([F.silu(self.ffn(x))], sequence)[0]


class Hybrid(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList([GdnBlock(), SoftmaxBlock()])
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=g))

    def forward(self, x, sequence):
        for block in self.blocks:
            x = (
                checkpoint(block, x, sequence, sequence=sequence)
                if self.checkpointed
                else block(x, sequence)
            )
        return x


def layout(valid=None) -> ClipLayout:
    """11 frames: two documents, chunks of 4, 3, 3, 1, and possibly rows of unequal length."""
    return ClipLayout(11, document_starts=(0, 7), chunk_starts=(0, 4, 7, 10), valid_frames=valid)


def clips(batch: int = 4, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    return torch.randn(batch, 11, TOKENS, WIDTH, generator=g, dtype=torch.float64).to(dtype)


def losses(model, x, sequence):
    """Per-clip losses [B] of clips x [B, T, S, C]: each member takes its own frames."""
    local = x[:, sequence.frames.start : sequence.frames.stop]
    out = model(local, sequence)
    return sequence.mean(out.square().mean((2, 3)), torch.ones(out.shape[:2], dtype=x.dtype))
