"""Backends: what is registered, and the cross-check that a user with a new device runs first."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from parallel.reference import REFERENCE
from wm_train.backends import __main__ as command
from wm_train.backends import check, get_backend, npu
from wm_train.backends.environment import worker_environment
from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.kernels.attention import engines


def test_check_passes_on_the_cpu_and_prints_every_entry_of_the_kernel_table(capsys):
    assert command.main(["check", "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    functions = [name for name in REFERENCE._fields if callable(getattr(REFERENCE, name))]
    assert all(name.removesuffix("_backward") in printed for name in functions)
    assert all(
        name in printed
        for name in (
            "short_convolution",
            "gdn_gram",
            "camera_output",
            "stream and event",
            "profiler",
        )
    )
    assert "OK: all 28 agree" in printed


def test_check_fails_on_a_kernel_that_is_slightly_wrong_and_on_one_that_raises(monkeypatch, capsys):
    def wrong(*arguments):
        states, final = REFERENCE.local_states(*arguments)
        return states * 1.001, final

    def raises(*arguments):
        raise RuntimeError("no valid execution plan")

    table = REFERENCE._replace(local_states=wrong, block_attention=raises)
    odd = replace(
        get_backend("cpu"), kernels=lambda *asked: table, memory=lambda: {"allocated": 2, "peak": 1}
    )
    failed = {row.what for row in check.check(odd) if not row.ok}
    assert {f"local_states ({name})" for name in ("numerator", "normaliser")} <= failed
    assert {"block_attention (full)", "block_attention (chunk-causal)", "memory"} <= failed
    assert len(failed) == 5
    monkeypatch.setattr("wm_train.backends.get_backend", lambda name: odd)
    assert command.main(["check"]) == 1
    assert "FAILED: 7 of 28" in capsys.readouterr().out


def test_a_backend_that_is_not_there_is_named(capsys):
    assert command.main(["check", "--backend", "npu"]) == 2
    assert "expected torch_npu and a device that it sees" in capsys.readouterr().err


def test_third_parties_register_by_entry_point(monkeypatch):
    mine = replace(get_backend("cpu"), name="mine")
    point = SimpleNamespace(name="mine", load=lambda: lambda threads, local_rank: mine)
    monkeypatch.setattr(
        "wm_train.backends.entry_points",
        lambda group: [point] if group == "wm_train.backends" else [],
    )
    assert get_backend("mine") is mine


@pytest.mark.parametrize(
    ("key", "choices"),
    [("kernels", "auto, triton, reference"), ("attention", "auto, cudnn, flash, ")],
)
def test_engines_are_config_keys_with_choices(key, choices):
    found = [
        p
        for p in problems_of(compose(["experiment=demo", "recipe=demo", f"backend.{key}=fast"]))
        if p.where == f"backend.{key}"
    ]
    assert len(found) == 1
    assert choices in found[0].rule


def test_an_engine_that_this_device_lacks_is_a_setup_error_before_anything_runs(
    train_here, tmp_path
):
    with pytest.raises(ValueError, match="got engine 'cudnn' on cpu"):
        train_here(tmp_path, "backend.attention=cudnn")


MOST = 2147483647  # tokens before and after: all


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_fused_attention_of_npus_is_called_as_documented(monkeypatch, dtype, tolerance):
    """A stand-in with the schemas that torch_npu registers (npu_fusion_attention,
    npu_fusion_attention_grad) and the dtypes and shapes that its operator asks for; it returns a
    row's maximum and sum eight times in fp32, as the operator does."""

    def forward(
        query,
        key,
        value,
        head_num,
        input_layout,
        pse=None,
        padding_mask=None,
        atten_mask=None,
        scale=1.0,
        keep_prob=1.0,
        pre_tockens=MOST,
        next_tockens=MOST,
        inner_precise=0,
        prefix=None,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
        sparse_mode=0,
        gen_mask_parallel=True,
        sync=False,
    ):
        assert (head_num, input_layout) == (query.shape[2], "BSND")
        assert query.dtype == key.dtype == value.dtype == dtype
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query.float() @ key.float().transpose(-1, -2) * scale
        largest = scores.amax(-1, keepdim=True)
        total = (scores - largest).exp().sum(-1, keepdim=True)
        out = ((scores - largest).exp() / total @ value.float()).to(dtype)
        return (
            out.transpose(1, 2),
            largest.expand(*largest.shape[:-1], 8),
            total.expand(*total.shape[:-1], 8),
            torch.empty(0),
            0,
            0,
            0,
        )

    def backward(
        query,
        key,
        value,
        dy,
        head_num,
        input_layout,
        *,
        pse=None,
        padding_mask=None,
        atten_mask=None,
        softmax_max=None,
        softmax_sum=None,
        softmax_in=None,
        attention_in=None,
        scale_value=1.0,
        keep_prob=1.0,
        pre_tockens=MOST,
        next_tockens=MOST,
        inner_precise=0,
        seed=0,
        offset=0,
        numels=0,
        prefix=None,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
        sparse_mode=0,
        gen_mask_parallel=True,
        sync=False,
    ):
        assert (head_num, input_layout) == (query.shape[2], "BSND")
        assert query.dtype == key.dtype == value.dtype == dy.dtype == attention_in.dtype == dtype
        assert softmax_max.dtype == softmax_sum.dtype == torch.float32
        assert softmax_max.shape == softmax_sum.shape == (len(query), head_num, query.shape[1], 8)
        assert softmax_max.is_contiguous()
        assert softmax_sum.is_contiguous()
        query, key, value, dy, attention_in = (
            x.float().transpose(1, 2) for x in (query, key, value, dy, attention_in)
        )
        p = (
            query @ key.transpose(-1, -2) * scale_value - softmax_max[..., :1]
        ).exp() / softmax_sum[..., :1]
        score = (
            p
            * (dy @ value.transpose(-1, -2) - (dy * attention_in).sum(-1, keepdim=True))
            * scale_value
        )
        return (
            *(
                x.to(dtype).transpose(1, 2)
                for x in (score @ key, score.transpose(-1, -2) @ query, p.transpose(-1, -2) @ dy)
            ),
            None,
        )

    module = ModuleType("torch_npu")
    module.npu_fusion_attention, module.npu_fusion_attention_grad = forward, backward
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    q, k, v, grad = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, 9, 9, 5))
    out, lse = engines.plain(q, k, v)
    close(engines.npu_fusion(q, k, v), (out, lse))
    part = (
        grad.float(),
        q,
        k[:, :, :4].contiguous(),
        v[:, :, :4].contiguous(),
        out.float(),
        lse,
    )  # as ring attention hands them over
    close(engines.npu_fusion_backward(*part), engines.plain_backward(*part))


def test_workers_get_what_device_libraries_read(monkeypatch):
    given = {"HCCL_IF_IP": "10.0.0.1", "NCCL_DEBUG": "INFO", "ASCEND_RT_VISIBLE_DEVICES": "3"}
    given |= {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "HOME": "/root", "A_KEY": "x"}
    found = worker_environment(given, 600.5, False)
    assert found == {
        "HCCL_IF_IP": "10.0.0.1",
        "NCCL_DEBUG": "INFO",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_CONNECT_TIMEOUT": "601",
        "HCCL_EXEC_TIMEOUT": "601",
    }
    assert worker_environment({}, 60, False)["HCCL_CONNECT_TIMEOUT"] == "120"
    assert worker_environment({"HCCL_EXEC_TIMEOUT": "9"}, 60, False)["HCCL_EXEC_TIMEOUT"] == "9"
    exact = worker_environment({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, 60, True)
    assert (exact["HCCL_DETERMINISTIC"], exact["CUBLAS_WORKSPACE_CONFIG"]) == ("true", ":16:8")


@pytest.mark.parametrize(
    ("name", "peak"), [("Ascend910B2", 313e12), ("Ascend910_9382", 376e12), ("Ascend310P3", None)]
)
def test_an_npu_has_the_peak_of_its_die_and_says_its_free_memory(monkeypatch, name, peak):
    device = MagicMock(spec=["Stream", "Event"])
    device.get_device_name = lambda which: name
    device.mem_get_info = lambda which: (5, 9)
    device.device_count, device.is_available = lambda: 1, lambda: True
    device.set_device = device.synchronize = lambda *which: None
    monkeypatch.setattr(npu, "_module", lambda: device)
    monkeypatch.setattr(npu, "present", lambda: True)
    monkeypatch.setattr(npu, "take_device", lambda *rest: torch.device("cpu"))
    backend = npu.make(1, 0)
    assert backend.peak_flops == peak
    assert backend.free_memory() == 5
