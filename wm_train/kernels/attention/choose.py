"""Choose the softmax attention of a device: once per device, dtype and head dim, tested and logged.

Masks never reach a dense engine: `parallel.masks` has cut them into tiles of whole frames. `flex`
takes all tiles of a masked block in one kernel, and leaves unmasked blocks to the dense engine; it
is used on request only, as no device has shown yet that it pays. An engine is tested forward and
backward against plain products, with an external log-sum-exp as ring attention needs it. One that
is absent, fails or differs is not used, and the log says why. Key backend.attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.local_attention import (
    block_attention,
    block_attention_backward,
    dense_attention,
    dense_attention_backward,
)
from parallel.masks import Tile
from parallel.reference import REFERENCE, Kernels
from wm_train.kernels.attention import engines
from wm_train.kernels.attention.engines import plain, plain_backward
from wm_train.kernels.engine import log
from wm_train.kernels.names import ATTENTION

TOLERANCE = 2e-2  # RMS ratio to plain products in fp32, for bf16 and fp16 operands


class Engine(NamedTuple):
    """Describe the requirements of an engine.

    capability: from … up to, on CUDA; widest: largest head dim, a multiple of 8; module: package;
    auto: tried without being requested.
    """

    device: str
    capability: tuple[tuple[int, int], tuple[int, int]]
    widest: int
    module: str | None
    auto: bool


VENDORS_ATTENTION = ("npu_fusion_attention", "npu_fusion_attention_v3")
ANY = ((0, 0), (99, 0))
TABLE = {  # dense engines for halves, best first
    "cudnn": Engine("cuda", ((9, 0), (99, 0)), 128, None, True),
    "flash_attn_3": Engine("cuda", ((9, 0), (9, 9)), 256, "flash_attn_interface", True),
    "flash": Engine("cuda", ((8, 0), (99, 0)), 256, None, True),
    "flash_attn": Engine("cuda", ((8, 0), (99, 0)), 256, "flash_attn", False),
    "npu_fusion": Engine("npu", ANY, 768, "torch_npu", True),
}


def attention_candidates(
    engine: str, device: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> tuple[str, ...]:
    """Return the dense engines to try on a device type, best first.

    Raises ValueError for an unknown name, or one of another device.
    """
    if engine not in ATTENTION:
        raise ValueError(
            f"attention: got engine {engine!r}, expected one of {', '.join(ATTENTION)} (key"
            " backend.attention). Fix: auto"
        )
    if engine in TABLE:
        if TABLE[engine].device != device:
            raise ValueError(
                f"attention: got engine {engine!r} on {device}, expected one for that device (key"
                " backend.attention). Fix: engine='auto'"
            )
        return (engine,)
    if engine == "plain" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8:
        return ("plain",)
    fitting = [
        name
        for name, e in TABLE.items()
        if e.auto
        and e.device == device
        and e.capability[0] <= capability <= e.capability[1]
        and head_dim <= e.widest
    ]
    return (*fitting, "plain")


def functions(
    engine: str,
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Return forward and backward of one dense engine."""
    table = {
        "cudnn": (engines.cudnn_attention, engines.cudnn_attention_backward),
        "flash_attn_3": (engines.flash_attn_3, engines.flash_attn_3_backward),
        "flash": (engines.flash_attention, engines.flash_attention_backward),
        "flash_attn": (engines.flash_attn, engines.flash_attn_backward),
        "npu_fusion": (engines.npu_fusion, engines.npu_fusion_backward),
        "plain": (plain, plain_backward),
    }
    return table[engine]


def defect(engine: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return the reason why an engine must not be used here.

    None if 40 queries against two blocks of keys give the right result, forward and backward.
    """
    module = TABLE[engine].module if engine in TABLE else None
    if module is not None and find_spec(module) is None:
        return f"the package {module} is not installed"
    generator = torch.Generator().manual_seed(0)
    q, first, second, v_first, v_second, grad = (
        torch.randn(1, 2, 40, head_dim, generator=generator).to(device, dtype) for _ in range(6)
    )
    forward, backward = functions(engine)
    expected, sums = plain(q, torch.cat((first, second), 2), torch.cat((v_first, v_second), 2))
    wanted = plain_backward(grad, q, first, v_first, expected, sums)
    _, sums_first = plain(q, first, v_first)
    try:
        out, lse = forward(q, torch.cat((first, second), 2), torch.cat((v_first, v_second), 2))
        _, lse_first = forward(q, first, v_first)
        got = backward(grad, q, first, v_first, expected, sums)
    except (RuntimeError, ValueError, TypeError, ImportError) as reason:
        return f"it raised {type(reason).__name__}: {str(reason).splitlines()[0]}"
    pairs = ((out, expected), (lse, sums), (lse_first, sums_first), *zip(got, wanted))
    worst = max(((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs)
    return (
        None
        if worst <= TOLERANCE
        else f"its results differ from plain products by {worst:.1e}, more than {TOLERANCE}"
    )


@lru_cache(maxsize=32)
def attention_engine(engine: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the dense engine for these inputs, tested and logged once.

    Raises ValueError if the requested one does not work.
    """
    where = f"{device}, {dtype}, head dim {head_dim}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    for name in attention_candidates(engine, device.type, capability, dtype, head_dim):
        reason = None if name == "plain" else defect(name, device, dtype, head_dim)
        if reason is None:
            log.info("attention: %s (%s)", name, where)
            return name
        if engine == name:
            raise ValueError(
                f"attention: got engine {engine!r} on {where}, expected one that works: {reason}."
                " Fix: engine='auto'"
            )
        log.warning("attention: not %s (%s): %s", name, where, reason)
    raise AssertionError("plain comes last and needs no trial")


def attend_tile(q: Tensor, k: Tensor, v: Tensor, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute one dense tile on the device's best engine; signature of `dense_attention`."""
    return functions(attention_engine(engine, q.device, q.dtype, q.shape[-1]))[0](q, k, v)


def attend_tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, engine: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward of a tile; signature of `dense_attention_backward`."""
    return functions(attention_engine(engine, q.device, q.dtype, q.shape[-1]))[1](
        grad, q, k, v, out, lse
    )


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], dense: Callable
) -> tuple[Tensor, Tensor]:
    """Compute `block_attention`: masked blocks by FlexAttention, the others by `dense`.

    Its gradients are those of `flex_attention_backward`.
    """
    if len(tiles) > 1:
        return engines.flex_block(q.detach(), k.detach(), v.detach(), tiles)
    return block_attention(q, k, v, tiles, dense)


def flex_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: tuple[Tile, ...],
    dense: Callable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `block_attention_backward` in the same way.

    On CPUs, where FlexAttention has no backward, it goes tile by tile.
    """
    if len(tiles) > 1 and q.device.type != "cpu":
        return engines.flex_block_backward(grad, q, k, v, out, lse, tiles)
    return block_attention_backward(grad, q, k, v, out, lse, tiles, dense)


def own_products(device: torch.device) -> tuple[Any, ...]:
    """Return a vendor's own attention operators as its package has registered them."""
    space = getattr(torch.ops, device.type)
    found = (getattr(space, name, None) for name in VENDORS_ATTENTION)
    return tuple(packet.default for packet in found if packet is not None)


def with_attention(device: torch.device, engine: str, table: Kernels = REFERENCE) -> Kernels:
    """Return the kernel table with this device's softmax attention.

    Raises ValueError for an engine that is unknown or belongs to another device.
    """
    attention_candidates(engine, device.type, ANY[1], torch.bfloat16, 128)
    forward: Callable = dense_attention
    backward: Callable = dense_attention_backward
    if device.type != "cpu":
        dense = "auto" if engine == "flex" else engine
        forward, backward = (
            partial(attend_tile, engine=dense),
            partial(attend_tile_backward, engine=dense),
        )
        table = table._replace(products=own_products(device))
    elif engine in ("auto", "plain"):
        return table  # the CPU's own kernels are the reference
    if engine == "flex":
        log.info("attention: flex for masked blocks (%s)", device)
        return table._replace(
            block_attention=partial(flex_attention, dense=forward),
            block_attention_backward=partial(flex_attention_backward, dense=backward),
        )
    return table._replace(
        block_attention=partial(block_attention, dense=forward),
        block_attention_backward=partial(block_attention_backward, dense=backward),
    )
