"""A packed pass is the stream's pass of every chunk; only noisy frames take gradients."""

from __future__ import annotations

import pytest
import torch

from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout
from parallel.masks import CHUNK_CAUSAL, AttentionMask
from parallel.packed import CleanPass, NoisyPass
from parallel.reference import Stream
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState
from parallel.virtual import run_virtual

FRAMES = 9
LAYOUTS = {
    "frames": ClipLayout(FRAMES, chunk_starts=(0, 2, 3, 4, 5, 6, 7, 8)),
    "chunks": ClipLayout(FRAMES, chunk_starts=(0, 4, 7)),
}
MASKS = {
    "local": AttentionMask("frame", window=3),
    "global": AttentionMask("frame", window=1, dilation=2, reach=6),
    "chunk": CHUNK_CAUSAL,
    "chunk window": AttentionMask("chunk", window=2, sink=1),
}
NAMES = ("q", "k", "v")


def block(view, q, k, v, mask):
    """Two calls of the verb, the second of what the first made."""
    return view.attend(view.attend(q, k, v, mask), k, v, mask)


def streamed(layout, mask, clean, noisy, run=block):
    """Each chunk with a past of clean frames, as in a rollout -> the noisy outputs."""
    clip, state, made = LocalSequence(layout), StreamState(), []
    for start in layout.chunk_starts:
        own = slice(start, layout.chunk_of(start).stop)
        view = StreamingSequence(clip, state, remember=False)
        made.append(run(view, *(x[:, own] for x in noisy), mask))
        view = StreamingSequence(clip, state)
        with torch.no_grad():
            run(view, *(x[:, own] for x in clean), mask)
        state = view.after()
    return torch.cat(made, 1)


@pytest.fixture
def given(oracles):
    def make(layout, mask):
        case = oracles.Case(layout, ("attend",), mask=mask, key_heads=2)
        full, other = (
            oracles.inputs(case),
            oracles.inputs(oracles.Case(**{**vars(case), "seed": 1})),
        )
        return [full[n] for n in NAMES], [other[n] for n in NAMES], full["out.upstream"]

    return make


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_pass_is_the_streams_pass_of_every_chunk(oracles, given, layout, mask):
    """Values, and gradients of noisy frames, on several meshes; clean ones take none."""
    layout, mask = LAYOUTS[layout], MASKS[mask]
    clean, noisy, upstream = given(layout, mask)
    leaves = [x.clone().requires_grad_() for x in noisy]
    expected = streamed(layout, mask, clean, leaves)
    (expected * upstream).sum().backward()
    for grid in ((1, 1), (3, 1), (1, 2), (2, 2)):
        mine = [x.clone().requires_grad_() for x in noisy]
        context = [x.clone().requires_grad_() for x in clean]

        def body(comm, mine=mine, context=context):
            clip = GroupSequence(layout, comm)
            local = slice(clip.frames.start, clip.frames.stop)
            first = CleanPass(clip)
            block(first, *(x[:, local] for x in context), mask)
            out = block(NoisyPass(clip, first.kept), *(x[:, local] for x in mine), mask)
            return out, (out * upstream[:, local]).sum()

        results, _ = run_virtual(body, *grid)
        sum(loss for _, loss in results).backward()
        out = torch.cat([out for out, _ in results], 1)
        assert oracles.relative(out, expected) <= 1e-12, grid
        for x, leaf in zip(mine, leaves, strict=True):
            assert oracles.relative(x.grad, leaf.grad) <= 1e-12, grid
        assert all(x.grad is None for x in context)


@pytest.mark.parametrize("keep_products", [False, True])
def test_recomputing_a_packed_block_changes_no_bit_of_its_gradient(given, keep_products):
    layout, mask = LAYOUTS["frames"], MASKS["global"]
    clean, noisy, upstream = given(layout, mask)
    found = []
    for again in (False, True):
        clip = LocalSequence(layout)
        first = CleanPass(clip)
        with torch.no_grad():
            block(first, *clean, mask)
            block(first, *clean, mask)
        leaves = [x.clone().requires_grad_() for x in noisy]
        view = NoisyPass(clip, first.kept)
        q = leaves[0]
        for _ in range(2):
            if again:
                q = checkpoint(
                    block, view, q, *leaves[1:], mask, sequence=view, keep_products=keep_products
                )
            else:
                q = block(view, q, *leaves[1:], mask)
        (q * upstream).sum().backward()
        found.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_that_is_not_attention_alone_is_refused():
    layout = LAYOUTS["frames"]
    x = torch.randn(1, FRAMES, 1, 2, 4)
    for view in (CleanPass(LocalSequence(layout)), NoisyPass(LocalSequence(layout), [])):
        stream = Stream(x[..., 0, 0], x, x)
        with pytest.raises(
            ValueError, match=r"got a scan, expected attention alone.*gradient=late"
        ):
            view.scan([stream])
        with pytest.raises(ValueError, match="got a convolution over time"):
            view.halo([x], 1, 1)
    with pytest.raises(ValueError, match="got verb call 1, expected 0"):
        NoisyPass(LocalSequence(layout), []).attend(x, x, x, MASKS["local"])
