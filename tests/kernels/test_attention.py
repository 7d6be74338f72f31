"""Check which attention kernel a CUDA device gets, and that a wrong one is detected before its
use."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.layout import ClipLayout, FrameRange
from parallel.masks import FULL, AttentionMask, tiles
from parallel.reference import REFERENCE
from parallel.ring import merge
from wm_train.kernels.attention import choose, engines

CPU = torch.device("cpu")


@pytest.fixture
def on_a_device(monkeypatch):
    """Pretend that the CPU is a CUDA device of capability 9.0, with functions of ours as its
    cuDNN."""
    choose.attention_engine.cache_clear()
    candidates = choose.attention_candidates
    monkeypatch.setattr(
        choose,
        "attention_candidates",
        lambda engine, device, _, *rest: candidates(engine, "cuda", (9, 0), *rest),
    )

    def install(forward, backward) -> None:
        kept = choose.functions
        monkeypatch.setattr(
            choose,
            "functions",
            lambda engine: (forward, backward) if engine == "cudnn" else kept(engine),
        )

    return install


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 112, ("cudnn", "flash_attn_3", "flash", "plain")),
        ((10, 0), torch.float16, 256, ("flash", "plain")),
        ((8, 0), torch.bfloat16, 112, ("flash", "plain")),
        ((7, 5), torch.float16, 64, ("plain",)),
        ((9, 0), torch.float32, 112, ("plain",)),
        ((9, 0), torch.bfloat16, 100, ("plain",)),
    ],
)
def test_candidates_follow_capability_dtype_and_head_dim(capability, dtype, head_dim, expected):
    assert choose.attention_candidates("auto", "cuda", capability, dtype, head_dim) == expected
    assert choose.attention_candidates("flash", "cuda", capability, dtype, head_dim) == ("flash",)


def test_an_engine_that_works_is_chosen_once_and_logged(on_a_device, caplog):
    on_a_device(choose.plain, choose.plain_backward)
    with caplog.at_level(logging.INFO, "wm_train.kernels"):
        names = {choose.attention_engine("auto", CPU, torch.bfloat16, 112) for _ in range(3)}
    assert names == {"cudnn"}
    assert [r.message.split(" (")[0] for r in caplog.records] == ["attention: cudnn"]


def test_a_log_sum_exp_of_another_base_is_found_out(on_a_device, caplog):
    """As yunchang's cuDNN path, whose ring forward is silently wrong: outputs are right, the
    log-sum-exp is not."""

    def other_base(q, k, v):
        out, lse = choose.plain(q, k, v)
        return out, lse * 1.4427

    on_a_device(other_base, choose.plain_backward)
    with caplog.at_level(logging.WARNING, "wm_train.kernels"):
        assert choose.attention_engine("auto", CPU, torch.float16, 112) != "cudnn"
    assert "attention: not cudnn" in caplog.text
    assert "differ from plain products" in caplog.text
    with pytest.raises(ValueError, match="Fix: engine='auto'"):
        choose.attention_engine("cudnn", CPU, torch.float16, 112)


def test_a_backward_that_ignores_the_foreign_log_sum_exp_is_found_out(on_a_device):
    def own_sums(grad, q, k, v, out, lse):
        own_out, own_lse = choose.plain(q, k, v)
        return choose.plain_backward(grad, q, k, v, own_out, own_lse)

    on_a_device(choose.plain, own_sums)
    assert "differ" in choose.defect("cudnn", CPU, torch.bfloat16, 112)


def test_an_engine_that_raises_is_not_used(on_a_device):
    def broken(q, k, v):
        raise RuntimeError("no valid execution plans\nmore")

    on_a_device(broken, choose.plain_backward)
    assert (
        choose.defect("cudnn", CPU, torch.bfloat16, 112)
        == "it raised RuntimeError: no valid execution plans"
    )


def test_cudnn_adapter_fits_the_operators_signatures():
    """Shapes only, on fake device tensors: what PyTorch's own shape rules say of the calls."""
    with FakeTensorMode():
        q, grad = (
            torch.empty(2, 4, 40, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        k, v = (torch.empty(2, 4, 72, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = engines.cudnn_attention(q, k, v)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 40)
        assert [x.shape for x in engines.cudnn_attention_backward(grad, q, k, v, out, lse)] == [
            q.shape,
            k.shape,
            v.shape,
        ]


def test_flash_adapter_fits_the_operators_signatures():
    with FakeTensorMode():
        q, grad = (
            torch.empty(2, 4, 40, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        k, v = (torch.empty(2, 4, 72, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = engines.flash_attention(q, k, v)
        assert [x.shape for x in engines.flash_attention_backward(grad, q, k, v, out, lse)] == [
            q.shape,
            k.shape,
            v.shape,
        ]


def test_an_absent_library_is_a_logged_fallback_and_an_error_when_asked_for(on_a_device, caplog):
    with caplog.at_level(logging.WARNING, "wm_train.kernels"):
        choose.attention_engine("auto", CPU, torch.bfloat16, 112)
    assert "not flash_attn_3" in caplog.text
    assert "the package flash_attn_interface is not installed" in caplog.text
    with pytest.raises(
        ValueError, match=r"package flash_attn is not installed\. Fix: engine='auto'"
    ):
        choose.attention_engine("flash_attn", CPU, torch.bfloat16, 112)


def test_an_engine_of_another_device_is_refused():
    with pytest.raises(
        ValueError,
        match=r"got engine 'cudnn' on cpu, expected one for that device \(key backend.attention\)",
    ):
        choose.with_attention(CPU, "cudnn")


def masked_block(layout: ClipLayout, mask: AttentionMask, queries: FrameRange, keys: FrameRange):
    """q, k, v, grad [B, n, 6, 2, 112] in fp64, and the tiles."""
    generator = torch.Generator().manual_seed(0)
    sizes = (len(queries), len(keys), len(keys), len(queries))
    return [
        torch.randn(2, n, 6, 2, 112, generator=generator, dtype=torch.float64) for n in sizes
    ], tiles(layout, mask, queries, keys)


CHUNKS = ClipLayout(8, chunk_starts=(0, 3, 5), valid_frames=(8, 6))


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask("chunk"),
        AttentionMask("chunk", window=1, sink=1),
        AttentionMask("frame"),
        AttentionMask("frame", window=1, dilation=2, reach=7),
        FULL,
    ],
    ids=str,
)
def test_flex_attention_equals_the_reference_under_masks_with_its_log_sum_exp(mask):
    """Chunk masks, padding, and rows that see nothing of a block, whose LSE is -inf as ring
    attention's merge needs it."""
    for keys in (FrameRange(0, 8), FrameRange(4, 8)):
        (q, k, v, _), pieces = masked_block(CHUNKS, mask, FrameRange(0, 8), keys)
        expected = REFERENCE.block_attention(q, k, v, pieces)
        for low, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            found = engines.flex_block(*(x.to(low) for x in (q, k, v)), pieces)
            for a, e in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=bound, atol=bound)


def test_flex_attention_takes_fewer_key_heads(monkeypatch):
    """Forward, and backward eager as on a device."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    whole, mask = FrameRange(0, 8), AttentionMask("frame", window=1, dilation=2, reach=7)
    (q, k, v, grad), pieces = masked_block(CHUNKS, mask, whole, whole)
    few = (q, k[..., :1, :], v[..., :1, :])
    expected = REFERENCE.block_attention(*few, pieces)
    for a, e in zip(engines.flex_block(*few, pieces), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    exact = REFERENCE.block_attention_backward(grad, *few, *expected, pieces)
    found = engines.flex_block_backward(grad, *few, *expected, pieces)
    for a, e in zip(found, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_two_flex_blocks_merge_as_in_a_ring():
    whole, halves = FrameRange(0, 8), (FrameRange(0, 4), FrameRange(4, 8))
    (q, k, v, _), pieces = masked_block(CHUNKS, AttentionMask("chunk"), whole, whole)
    expected = REFERENCE.block_attention(q, k, v, pieces)
    mask = AttentionMask("chunk")
    parts = [
        engines.flex_block(
            q, k[:, h.start : h.stop], v[:, h.start : h.stop], tiles(CHUNKS, mask, whole, h)
        )
        for h in halves
    ]
    for a, e in zip(merge(*parts[0], *parts[1]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_flex_backward_gives_a_blocks_share_of_a_softmax_over_more_keys(monkeypatch):
    """FlexAttention refuses gradients on CPUs; eager, on the same formulas as on a device, it can
    be made to give them."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    whole, half = FrameRange(0, 8), FrameRange(4, 8)
    (q, k, v, grad), pieces = masked_block(CHUNKS, AttentionMask("chunk"), whole, whole)
    out, lse = REFERENCE.block_attention(q, k, v, pieces)
    part = (k[:, 4:], v[:, 4:], out, lse, tiles(CHUNKS, AttentionMask("chunk"), whole, half))
    expected = REFERENCE.block_attention_backward(grad, q, *part)
    for a, e in zip(engines.flex_block_backward(grad, q, *part), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_flex_is_taken_for_masked_blocks_when_asked_for(caplog):
    with caplog.at_level(logging.INFO, "wm_train.kernels"):
        table = choose.with_attention(CPU, "flex")
    assert "attention: flex for masked blocks" in caplog.text
    (q, k, v, grad), pieces = masked_block(
        CHUNKS, AttentionMask("chunk"), FrameRange(0, 8), FrameRange(0, 8)
    )
    out, lse = table.block_attention(
        q.requires_grad_(), k, v, pieces
    )  # as the verb's autograd function calls it
    q = q.detach()
    expected = REFERENCE.block_attention(q, k, v, pieces)
    torch.testing.assert_close((out, lse), expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(out, expected[0])  # another kernel
    found = table.block_attention_backward(grad, q, k, v, out, lse, pieces)
    torch.testing.assert_close(
        found,
        REFERENCE.block_attention_backward(grad, q, k, v, *expected, pieces),
        rtol=1e-9,
        atol=1e-9,
    )
