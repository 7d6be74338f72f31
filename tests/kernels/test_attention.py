"""Which attention kernel a CUDA device gets, and that one which is wrong there is found out before it is used."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wm_train.kernels import attention

CPU = torch.device("cpu")


@pytest.fixture
def on_a_device(monkeypatch):
    """Pretend that the CPU is a CUDA device of capability 9.0, with functions of ours as its cuDNN."""
    attention.attention_engine.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def install(forward, backward) -> None:
        kept = attention.functions
        monkeypatch.setattr(attention, "functions", lambda engine: (forward, backward) if engine == "cudnn" else kept(engine))

    return install


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 112, ("cudnn", "flash", "plain")),
        ((10, 0), torch.float16, 256, ("flash", "plain")),
        ((8, 0), torch.bfloat16, 112, ("flash", "plain")),
        ((7, 5), torch.float16, 64, ("plain",)),
        ((9, 0), torch.float32, 112, ("plain",)),
        ((9, 0), torch.bfloat16, 100, ("plain",)),
    ],
)
def test_candidates_follow_capability_dtype_and_head_dim(capability, dtype, head_dim, expected):
    assert attention.attention_candidates("auto", capability, dtype, head_dim) == expected
    assert attention.attention_candidates("flash", capability, dtype, head_dim) == ("flash",)


def test_an_engine_that_works_is_chosen_once_and_logged(on_a_device, caplog):
    on_a_device(attention.plain_attention, attention.plain_attention_backward)
    with caplog.at_level(logging.INFO, "wm_train.kernels"):
        names = {attention.attention_engine("auto", CPU, torch.bfloat16, 112) for _ in range(3)}
    assert names == {"cudnn"}
    assert [r.message.split(" (")[0] for r in caplog.records] == ["attention: cudnn"]


def test_a_log_sum_exp_of_another_base_is_found_out(on_a_device, caplog):
    """As yunchang's cuDNN path, whose ring forward is silently wrong: outputs are right, the log-sum-exp is not."""

    def other_base(q, k, v):
        out, lse = attention.plain_attention(q, k, v)
        return out, lse * 1.4427

    on_a_device(other_base, attention.plain_attention_backward)
    with caplog.at_level(logging.WARNING, "wm_train.kernels"):
        assert attention.attention_engine("auto", CPU, torch.float16, 112) != "cudnn"
    assert "attention: not cudnn" in caplog.text
    assert "differ from plain products" in caplog.text
    with pytest.raises(ValueError, match="Fix: engine='auto'"):
        attention.attention_engine("cudnn", CPU, torch.float16, 112)


def test_a_backward_that_ignores_the_foreign_log_sum_exp_is_found_out(on_a_device):
    def own_sums(grad, q, k, v, out, lse):
        own_out, own_lse = attention.plain_attention(q, k, v)
        return attention.plain_attention_backward(grad, q, k, v, own_out, own_lse)

    on_a_device(attention.plain_attention, own_sums)
    assert "differ" in attention.defect("cudnn", CPU, torch.bfloat16, 112)


def test_an_engine_that_raises_is_not_used(on_a_device):
    def broken(q, k, v):
        raise RuntimeError("no valid execution plans\nmore")

    on_a_device(broken, attention.plain_attention_backward)
    assert attention.defect("cudnn", CPU, torch.bfloat16, 112) == "it raised RuntimeError: no valid execution plans"


def test_cudnn_adapter_fits_the_operators_signatures():
    """Shapes only, on fake device tensors: what PyTorch's own shape rules say of the calls."""
    with FakeTensorMode():
        q, grad = (torch.empty(2, 4, 40, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.empty(2, 4, 72, 112, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out, lse = attention.cudnn_attention(q, k, v)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 40)
        assert [x.shape for x in attention.cudnn_attention_backward(grad, q, k, v, out, lse)] == [q.shape, k.shape, v.shape]
