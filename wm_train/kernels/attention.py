"""Softmax attention of one dense tile on CUDA devices, by whichever library kernel this device runs right.

    cudnn   cuDNN's fused attention: capability 9.0 and up, where it uses the tensor cores as they want to be used
    flash   flash attention 2 as PyTorch ships it: capability 8.0 and up
    plain   matrix products over a bounded number of queries at a time (`parallel/local_attention.py`), anything else

Masks never reach a kernel: `parallel.masks` has cut them into dense tiles. Head dims that are no power of two (112) are padded inside the
kernels. An engine is tried once per device, dtype and head dim, forward and backward with a foreign log-sum-exp as ring attention needs it,
against plain products; one that fails or differs is not used, and the log says why. The first that holds is used from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from parallel.local_attention import accumulation_dtype, dense_attention, dense_attention_backward
from wm_train.kernels.engine import log

ATTENTION = ("auto", "cudnn", "flash", "plain")
TOLERANCE = 2e-2  # RMS ratio to plain products in fp32, for bf16 and fp16 operands


def attention_candidates(engine: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Engines to try on a CUDA device, best first. Raises ValueError for an unknown name."""
    if engine not in ATTENTION:
        raise ValueError(f"attention: got engine {engine!r}, expected one of {', '.join(ATTENTION)} (wm_train.kernels). Fix: engine='auto'")
    if engine != "auto":
        return (engine,)
    half = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0
    found = ["cudnn"] if half and capability >= (9, 0) and head_dim <= 128 else []
    found += ["flash"] if half and capability >= (8, 0) and head_dim <= 256 else []
    return (*found, "plain")


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `parallel.local_attention.dense_attention`: q [B, H, n, D], k, v [B, H, m, D] -> out [B, H, n, D], LSE [B, H, n]."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.squeeze(-1)


def cudnn_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `parallel.local_attention.dense_attention_backward`."""
    state = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))  # no dropout
    sizes = (None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad.to(q.dtype).contiguous(), q, k, v, out, lse.contiguous().unsqueeze(-1), *state, None, *sizes, 0.0, False
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Products in fp32 (fp64 for fp64): the library kernels of `dense_attention` take halves only."""
    wide = accumulation_dtype(q.dtype)
    out, lse = dense_attention(q.to(wide), k.to(wide), v.to(wide))
    return out.to(q.dtype), lse


def plain_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(q.dtype)
    grads = dense_attention_backward(grad.to(wide), q.to(wide), k.to(wide), v.to(wide), out.to(wide), lse)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


def functions(engine: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Forward and backward of one engine."""
    table = {
        "cudnn": (cudnn_attention, cudnn_attention_backward),
        "flash": (dense_attention, dense_attention_backward),
        "plain": (plain_attention, plain_attention_backward),
    }
    return table[engine]


def defect(engine: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why an engine must not be used here; None if 40 queries against two blocks of keys come out right, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, first, second, v_first, v_second, grad = (torch.randn(1, 2, 40, head_dim, generator=generator).to(device, dtype) for _ in range(6))
    forward, backward = functions(engine)
    expected, sums = plain_attention(q, torch.cat((first, second), 2), torch.cat((v_first, v_second), 2))
    wanted = plain_attention_backward(grad, q, first, v_first, expected, sums)
    _, sums_first = plain_attention(q, first, v_first)
    try:
        out, lse = forward(q, torch.cat((first, second), 2), torch.cat((v_first, v_second), 2))
        _, lse_first = forward(q, first, v_first)
        got = backward(grad, q, first, v_first, expected, sums)
    except (RuntimeError, ValueError) as reason:
        return f"it raised {type(reason).__name__}: {str(reason).splitlines()[0]}"
    pairs = ((out, expected), (lse, sums), (lse_first, sums_first), *zip(got, wanted))
    worst = max(((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs)
    return None if worst <= TOLERANCE else f"its results differ from plain products by {worst:.1e}, more than {TOLERANCE}"


@lru_cache(maxsize=32)
def attention_engine(engine: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The engine for these inputs on a CUDA device: tried, chosen once, logged. Raises ValueError if the one asked for does not work."""
    where = f"{device}, {dtype}, head dim {head_dim}"
    for name in attention_candidates(engine, torch.cuda.get_device_capability(device), dtype, head_dim):
        reason = defect(name, device, dtype, head_dim)
        if reason is None:
            log.info("attention: %s (%s)", name, where)
            return name
        if engine != "auto":
            raise ValueError(f"attention: got engine {engine!r} on {where}, expected one that works: {reason}. Fix: engine='auto'")
        log.warning("attention: not %s (%s): %s", name, where, reason)
    raise AssertionError("plain products cannot differ from themselves")


def attend_tile(q: Tensor, k: Tensor, v: Tensor, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """One dense tile on the device's best engine; signature of `dense_attention`."""
    if q.device.type != "cuda":
        return dense_attention(q, k, v)
    return functions(attention_engine(engine, q.device, q.dtype, q.shape[-1]))[0](q, k, v)


def attend_tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, engine: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward; signature of `dense_attention_backward`."""
    if q.device.type != "cuda":
        return dense_attention_backward(grad, q, k, v, out, lse)
    return functions(attention_engine(engine, q.device, q.dtype, q.shape[-1]))[1](grad, q, k, v, out, lse)
