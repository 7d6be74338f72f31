"""Check the adapters of flash_attn, flash_attn_3 and xfuser without a device: their calls bind to
the released signatures, and layouts, scale and log-sum-exp pass both ways unchanged."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from parallel.comm import Member
from parallel.engines import make_engine
from tests.kernels.signatures import PARAMETERS, signature
from wm_train.kernels.attention import choose, engines

FLASH = "flash_attn.flash_attn_interface."
FLASH_3 = "torch.ops.flash_attn_3."
XFUSER = "xfuser.core.long_ctx_attention.xFuserLongContextAttention"


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, n, H, D] of the libraries -> [B, H, n, D] of ours."""
    return [x.transpose(1, 2) for x in tensors]


def forward(name: str):
    """A library's forward of the released signature, by plain products."""

    def call(*args, **kwargs):
        bound = signature(name).bind(*args, **kwargs).arguments
        q, k, v = (bound[x] for x in "qkv")
        assert bound["softmax_scale"] in (None, pytest.approx(q.shape[-1] ** -0.5))
        assert (bound["causal"], bound["window_size_left"], bound["window_size_right"]) == (
            False,
            -1,
            -1,
        )
        assert bound["softcap"] == 0.0
        out, lse = engines.plain(*heads_first(q, k, v))
        out = out.transpose(1, 2)
        if bound.get("out") is not None:
            bound["out"].copy_(out)
        return out, lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    return call


def backward(name: str):
    """A library's backward: it writes into the gradients that it is given."""

    def call(*args, **kwargs):
        bound = signature(name).bind(*args, **kwargs).arguments
        tensors = heads_first(*(bound[x] for x in ("dout", "q", "k", "v", "out")))
        assert {x.dtype for x in tensors} == {tensors[1].dtype}
        assert bound["softmax_lse"].dtype == torch.float32
        assert bound["softmax_lse"].is_contiguous()
        for target, grad in zip(
            ("dq", "dk", "dv"), engines.plain_backward(*tensors, bound["softmax_lse"])
        ):
            bound[target].copy_(grad.transpose(1, 2))
        return torch.empty(0)

    return call


@pytest.fixture
def flash_2(monkeypatch):
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for name, make in (("_flash_attn_forward", forward), ("_flash_attn_backward", backward)):
        setattr(interface, name, make(FLASH + name))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(choose, "find_spec", lambda name: object())


@pytest.fixture
def flash_3(monkeypatch):
    """PyTorch's own path to flash attention 3, on the CPU, down to the release's two operators."""
    fa3 = pytest.importorskip("torch.nn.attention._fa3")
    asked = []

    def import_module(path: str) -> None:
        asked.append(path)
        fa3._FA3_CUDA_FWD = forward(FLASH_3 + "fwd")
        fa3._FA3_CUDA_BWD = backward(FLASH_3 + "bwd")

    monkeypatch.setattr(fa3, "_fa3_import_module", import_module)
    monkeypatch.setattr(fa3, "_fa3_common_support_error", lambda *args: None)
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    library = torch.library.Library("aten", "IMPL")
    for name, call in (
        ("", fa3._fa3_scaled_dot_product_flash_attention_forward_impl_default),
        ("_backward", fa3._fa3_scaled_dot_product_flash_attention_backward_impl),
    ):
        library.impl(f"_scaled_dot_product_flash_attention{name}", call, "CPU")
    yield asked
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 112])
def test_flash_attn_is_called_as_its_release_asks(flash_2, dtype, head_dim):
    """The trial that the device runs: forward, LSE, and a backward with a foreign LSE."""
    assert choose.defect("flash_attn", torch.device("cpu"), dtype, head_dim) is None


def test_flash_attn_3_is_called_as_its_release_asks(flash_3):
    assert choose.defect("flash_attn_3", torch.device("cpu"), torch.bfloat16, 112) is None
    assert flash_3 == [choose.TABLE["flash_attn_3"].module] == ["flash_attn_interface"]


def test_flash_after_flash_attn_3_is_pytorchs_own_again(flash_3):
    """Both are one operator of ATen: an engine that failed its trial must not go on as `flash`."""
    q, k, v = (torch.randn(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    engines.flash_attn_3(q, k, v)
    assert torch.nn.attention.current_flash_attention_impl() == "FA3"
    engines.flash_attention(q, k, v)
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_backward_in_wider_gradients_reaches_flash_in_its_own_dtype(flash_3):
    q, k, v = (torch.randn(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    out, lse = engines.flash_attn_3(q, k, v)
    grads = engines.flash_attn_3_backward(torch.randn(1, 2, 8, 16), q, k, v, out, lse)
    assert {g.dtype for g in grads} == {torch.bfloat16}


def test_xfuser_is_called_as_its_release_asks(monkeypatch):
    """Degrees in the release's order, and q, k, v [B, n, H, D] after the module that it ignores."""
    begun, made = [], []

    class Attention:
        def __init__(self, *args, **kwargs) -> None:
            made.append(signature(XFUSER).bind(*args, **kwargs).arguments)

        def __call__(self, *args, **kwargs):
            bound = signature(XFUSER + ".forward").bind(*args, **kwargs).arguments
            assert bound["attn"] is None
            return engines.plain(*heads_first(bound["query"], bound["key"], bound["value"]))[
                0
            ].transpose(1, 2)

    library, groups = ModuleType("xfuser.core.long_ctx_attention"), ModuleType("yunchang")
    library.xFuserLongContextAttention = Attention
    groups.set_seq_parallel_pg = lambda *args, **kwargs: begun.append(
        signature("yunchang.set_seq_parallel_pg").bind(*args, **kwargs).arguments
    )
    for name in ("xfuser", "xfuser.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setitem(sys.modules, "yunchang", groups)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)

    class Comm:
        members = (Member(1, 2, 2, 4),)

    _, attention = make_engine("xfuser", Comm())
    degrees = {"sp_ulysses_degree": 4, "sp_ring_degree": 2, "rank": 5, "world_size": 8}
    assert begun == [degrees | {"use_ulysses_low": True}]
    assert made == [{}]
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(*heads_first(q, k, v))
    torch.testing.assert_close(attention(q, k, v), exact.transpose(1, 2))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_call_that_does_not_bind_is_an_error(name):
    """The check itself can fail: one argument too many, and a name that is not there."""
    expected = signature(name)
    with pytest.raises(TypeError):
        expected.bind(*[None] * (len(expected.parameters) + 1))
    with pytest.raises(TypeError):
        expected.bind(no_such_parameter=None)
