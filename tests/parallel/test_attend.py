"""attend: every mask over Ulysses, ring and both, against dense masked attention in float64."""

from __future__ import annotations

import pytest
import torch

from parallel import local_attention
from parallel.layout import ClipLayout
from parallel.local_attention import block_attention
from parallel.masks import CHUNK_CAUSAL, FRAME_CAUSAL, FULL, AttentionMask
from parallel.ring import merge
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.kernels.attention import engines

GRIDS = (
    (1, 1),
    (1, 2),
    (1, 4),
    (2, 1),
    (3, 1),
    (4, 1),
    (8, 1),
    (2, 2),
    (2, 4),
    (4, 2),
)  # ring x ulysses
MASKS = {
    "full": FULL,
    "frame causal": FRAME_CAUSAL,
    "window": AttentionMask("frame", window=3),
    "window and dilated global frames": AttentionMask(
        "frame", window=2, sink=1, dilation=4, reach=9
    ),
    "chunk causal": CHUNK_CAUSAL,
    "chunks with sink and window": AttentionMask("chunk", window=2, sink=1),
}
KINDS = ("plain", "chunks 4,3,3", "documents", "ragged", "all")


def check(oracles, grid, mask, kind, frames, dtype=torch.float64, limits=(1e-11, 1e-11), **sizes):
    case = oracles.Case(oracles.layouts(frames)[kind], ("attend",), mask=mask, dtype=dtype, **sizes)
    found = oracles.joined(oracles.virtual_run(case, *grid)[0])
    errors = oracles.worst(
        found, oracles.serial_run(oracles.Case(**{**vars(case), "dtype": torch.float64}))
    )
    assert errors[0] <= limits[0], (case, errors)
    assert errors[1] <= limits[1], (case, errors)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"ring{grid[0]}xulysses{grid[1]}")
def test_attention_equals_dense_attention(oracles, grid, mask):
    for kind in KINDS:
        check(oracles, grid, MASKS[mask], kind, 11)
    check(oracles, grid, MASKS[mask], "all", 3)  # fewer frames than members


@pytest.mark.full
@pytest.mark.parametrize("frames", [1, 2, 5, 61, 121])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"ring{grid[0]}xulysses{grid[1]}")
def test_attention_equals_dense_attention_at_every_length(oracles, grid, mask, frames):
    for kind in KINDS:
        check(oracles, grid, MASKS[mask], kind, frames)


@pytest.mark.parametrize("grid", [(1, 4), (8, 1), (4, 2)])
def test_attention_in_single_precision(oracles, grid):
    for mask in MASKS.values():
        check(oracles, grid, mask, "all", 61, torch.float32, (5e-6, 3e-5))


@pytest.mark.parametrize(
    ("heads", "key_heads"), [(4, 1), (4, 2), (6, 2), (5, 5), (7, 7), (6, 3), (8, 2)]
)
def test_fewer_key_heads_and_heads_that_do_not_divide(oracles, heads, key_heads):
    for grid in ((1, 2), (1, 3), (1, 4), (2, 3)):
        check(oracles, grid, FRAME_CAUSAL, "all", 7, heads=heads, key_heads=key_heads)


def test_more_members_than_heads_names_the_valid_degrees():
    q = torch.randn(1, 4, 1, 2, 4)

    def body(comm):
        sequence = GroupSequence(ClipLayout(4), comm)
        part = q[:, sequence.frames.start : sequence.frames.stop]
        return sequence.attend(part, part, part)

    with pytest.raises(ValueError, match=r"Ulysses degree 3 for 2 heads.*one of \[1, 2\]"):
        run_virtual(body, ulysses=3)


def test_key_heads_must_divide_the_query_heads():
    q, k = torch.randn(1, 2, 1, 4, 4), torch.randn(1, 2, 1, 3, 4)
    with pytest.raises(ValueError, match="4 query heads and 3 key heads"):
        LocalSequence(ClipLayout(2)).attend(q, k, k)


def test_rows_that_see_nothing_give_zeros_and_minus_infinity():
    q = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64)
    out, lse = block_attention(q, q, q, ())
    assert torch.equal(out, torch.zeros_like(q))
    assert bool((lse == -torch.inf).all())
    merged, total = merge(out, lse, *block_attention(q, q, q, ()))
    assert torch.equal(merged, out)
    assert bool((total == -torch.inf).all())
    seen, seen_lse = torch.randn_like(out), torch.randn_like(lse)
    merged, total = merge(seen, seen_lse, out, lse)
    assert torch.equal(merged, seen)
    assert torch.equal(total, seen_lse)


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2)])
def test_a_row_without_any_real_frame_is_zero_with_zero_gradients(oracles, grid):
    case = oracles.Case(ClipLayout(5, valid_frames=(5, 0)), ("attend",))
    outputs, grads = oracles.joined(oracles.virtual_run(case, *grid)[0])
    for x in (*outputs.values(), *grads.values()):
        assert bool(torch.isfinite(x).all())
        assert not x[1].any()


def test_half_precision_does_not_get_worse_with_the_ring(oracles):
    """out and LSE are accumulated in float32: the error of 8 bfloat16 blocks stays that of one."""
    errors = []
    for ring in (1, 8):
        case = oracles.Case(ClipLayout(16), ("attend",), dtype=torch.bfloat16, dim=16, tokens=4)
        found = oracles.joined(oracles.virtual_run(case, ring, 1)[0])
        exact = oracles.serial_run(oracles.Case(**{**vars(case), "dtype": torch.float64}))
        errors.append(max(oracles.worst(found, exact)))
    assert errors[1] <= 1.5 * errors[0], errors


def test_collectives_and_bytes(oracles):
    """Ulysses: two all-to-alls each way. Ring of R: R − 1 shifts forward, 2R − 1 backward. Bytes as
    the modules' docstrings say."""
    frames, heads, dim, tokens, batch, width = 8, 4, 4, 2, 2, 8
    case = oracles.Case(
        ClipLayout(frames),
        ("attend",),
        heads=heads,
        key_heads=heads,
        dim=dim,
        tokens=tokens,
        batch=batch,
    )
    token = batch * tokens * dim * width  # bytes of one head of one frame
    for u in (2, 4):
        _, traffic = oracles.virtual_run(case, 1, u)
        t, h = frames // u, heads // u
        for member in traffic:
            assert member.collectives == {"attend forward": 2, "attend backward": 2}
            assert (
                member.sent["attend forward"]
                == member.sent["attend backward"]
                == (u - 1) * 4 * t * h * token
            )
    for r in (2, 4):
        _, traffic = oracles.virtual_run(case, r, 1)
        t = frames // r
        for member in traffic:
            assert member.collectives == {"attend forward": r - 1, "attend backward": 2 * r - 1}
            assert member.sent["attend forward"] == (r - 1) * 2 * t * heads * token
            assert member.sent["attend backward"] == ((r - 1) * 4 + 2) * t * heads * token


def test_the_plain_path_of_other_devices_equals_the_cpu_kernel(monkeypatch):
    """Also in pieces of few queries, and as one block's share of a softmax over more keys."""
    g = torch.Generator().manual_seed(2)
    q, k, v, grad = (
        torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (10, 14, 14, 10)
    )
    monkeypatch.setattr(local_attention, "SCORES_AT_ONCE", 2 * 3 * 14 * 4)
    out, lse = local_attention.dense_attention(q, k, v)
    found = local_attention.plain_attention(q, k, v)
    torch.testing.assert_close(found, (out, lse), rtol=1e-12, atol=1e-12)
    for keys in (slice(0, 14), slice(0, 5)):
        block = (grad, q, k[:, :, keys].contiguous(), v[:, :, keys].contiguous(), out, lse)
        expected = local_attention.dense_attention_backward(*block)
        torch.testing.assert_close(
            local_attention.plain_attention_backward(*block), expected, rtol=1e-11, atol=1e-12
        )


def test_the_flash_path_of_accelerators_is_called_with_the_right_arguments():
    """Shapes and dtypes on meta tensors; the numbers need a device."""
    q, k = (torch.empty(2, 4, n, 112, dtype=torch.bfloat16, device="meta") for n in (40, 60))
    out, lse = engines.flash_attention(q, k, k)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    grads = engines.flash_attention_backward(out, q, k, k, out, lse)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
