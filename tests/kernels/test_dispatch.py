"""Check which engine runs, the log lines, and the refused shapes. No Triton is needed here."""

from __future__ import annotations

import logging

import pytest
import torch

from parallel.reference import REFERENCE
from wm_train.kernels import dispatch, engine, trial

B, T, S, H, D = 2, 3, 5, 2, 16


@pytest.fixture(autouse=True)
def forget_choices():
    """Choices are logged once; every test starts without any."""
    engine.resolve.cache_clear()
    dispatch.sequence_kernels.cache_clear()


@pytest.fixture
def arguments():
    angle = torch.randn(1, T, S, 1, D // 2)
    return {
        "key": torch.randn(B, T, S, H * D),
        "value": torch.randn(B, T, S, H * D),
        "beta": torch.rand(B, T, S, H),
        "weight": torch.ones(H * D),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "scale": 0.1,
    }


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "reason"),
    [
        ("cuda", (7, 5), torch.bfloat16, 112, "capability 8.0"),
        ("cuda", (9, 0), torch.bfloat16, 256, "head dims 16 … 128"),
        ("cuda", (9, 0), torch.float16, 112, "float32 and bfloat16"),
        ("cuda", (9, 0), torch.float32, 112, "more shared memory"),
        ("npu", None, torch.bfloat16, 112, "triton-ascend"),
        ("xpu", None, torch.bfloat16, 112, "xpu"),
    ],
)
def test_a_missing_kernel_is_a_logged_fallback(
    device, capability, dtype, head_dim, reason, caplog, monkeypatch
):
    monkeypatch.setattr(
        engine.importlib.util,
        "find_spec",
        lambda name: None if name.endswith("ascend") else object(),
    )
    monkeypatch.setattr(engine, "interpreted", lambda: False)
    with caplog.at_level(logging.WARNING, "wm_train.kernels"):
        answers = {
            engine.resolve("auto", "tokens", device, capability, dtype, head_dim) for _ in range(3)
        }
    assert answers == {"reference"}
    assert len(caplog.records) == 1  # once per distinct answer
    assert reason in caplog.text
    with pytest.raises(ValueError, match="Fix: engine='auto'"):
        engine.resolve("triton", "tokens", device, capability, dtype, head_dim)


def test_npus_take_triton_where_it_is_triton_ascend(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    assert engine.resolve("auto", "tokens", "npu", None, torch.bfloat16, 96) == "triton"


def test_a_compiler_that_raises_anything_at_all_fails_the_trial(monkeypatch):
    def broken(*arguments):
        raise AttributeError("no such instruction")

    monkeypatch.setattr(trial, "_states", broken)
    assert (
        trial.defect("states", torch.device("cpu"), torch.float32, 32)
        == "the trial raised AttributeError: no such instruction"
    )


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_cuda_takes_triton_and_says_so(capability, caplog, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    with caplog.at_level(logging.INFO, "wm_train.kernels"):
        assert engine.resolve("auto", "tokens", "cuda", capability, torch.bfloat16, 112) == "triton"
        assert (
            engine.resolve("reference", "tokens", "cuda", capability, torch.bfloat16, 112)
            == "reference"
        )
    assert "kernels: triton (tokens, cuda" in caplog.text
    assert "as asked" in caplog.text


def test_fp32_states_take_triton_at_any_head_dim(monkeypatch):
    """Only tokens in fp32 are too wide for the shared memory; the recurrences are fp32 always."""
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine, "interpreted", lambda: False)
    assert engine.resolve("auto", "states", "cuda", (9, 0), torch.float32, 112) == "triton"
    assert engine.resolve("auto", "tokens", "cuda", (9, 0), torch.float32, 64) == "triton"


def test_without_triton_the_reference_runs_and_the_log_says_why(caplog, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "wm_train.kernels"):
        assert engine.resolve("auto", "tokens", "cuda", (9, 0), torch.bfloat16, 112) == "reference"
    assert "triton is not installed" in caplog.text


def test_cpu_runs_the_reference_and_its_table_is_one_object(arguments):
    assert dispatch.sequence_kernels(torch.device("cpu")) is REFERENCE
    gram, update, gram_z, update_z = dispatch.gdn_gram(**arguments)
    assert gram.shape == update.shape == gram_z.shape == (B, T, H, D, D)
    assert update_z.shape == (B, T, H, 1, D)


def test_an_unknown_engine_is_an_error(arguments):
    with pytest.raises(
        ValueError, match="got engine 'fast', expected one of auto, triton, reference"
    ):
        dispatch.gdn_gram(**arguments, engine="fast")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("value", (B, T, S, D), r"got value \(2, 3, 5, 16\), expected \(2, 3, 5, 32\)"),
        ("beta", (B, T, S + 1, H), r"got beta \(2, 3, 6, 2\), expected \(2, 3, 5, 2\)"),
        ("weight", (D,), r"got norm weight \(16,\), expected \(32,\)"),
        (
            "sin",
            (1, T, S, 1, D),
            r"got rotary sin \(1, 3, 5, 1, 16\), expected \(2, 3, 5, 1, 8\), or 1 for 2",
        ),
        ("key", (T, S, H * D), r"got tokens \(3, 5, 32\), expected \[B, t, S, H·D\]"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(arguments, name, shape, message):
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        dispatch.gdn_gram(**arguments)


def test_no_tokens_keep_the_graph(arguments):
    """A rank may hold no frames: shapes come out empty and gradients still flow."""
    empty = {k: x[:, :0] if torch.is_tensor(x) and x.dim() > 1 else x for k, x in arguments.items()}
    empty["key"] = empty["key"].requires_grad_()
    out = dispatch.gdn_gram(**empty)
    assert out[0].shape == (B, 0, H, D, D)
    sum(x.sum() for x in out).backward()
    assert empty["key"].grad.shape == (B, 0, S, H * D)
